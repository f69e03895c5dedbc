"""Packages unpacked without root."""

import gzip
import shutil
import subprocess

import pytest

from xtuner_ext.data.sources.debian import debian_sources, fetch, unpack
from xtuner_ext.data.sources.documents import read_documents
from xtuner_ext.errors import UserError

from .conftest import prose

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")


@pytest.fixture
def build(tmp_path):
    """Function that packs files into a package."""

    def build(**files):
        tree = tmp_path / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        (tree / "DEBIAN").mkdir(parents=True)
        fields = {"Package": "mill-doc", "Version": "1:2.3-4", "Architecture": "all", "Description": "mills"}
        fields["Maintainer"] = "Me <me@example.org>"
        (tree / "DEBIAN" / "control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
        folder = tree / "usr" / "share" / "doc" / "mill-doc"
        folder.mkdir(parents=True)
        (folder / "copyright").write_text("Free for all.")
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_bytes(content)
        package = tmp_path / "mill-doc.deb"
        command = ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(package)]
        subprocess.run(command, check=True, capture_output=True)
        return package

    return build


@pytest.fixture
def fake_apt(tmp_path, monkeypatch):
    """Function that puts another apt-get first."""

    def fake(script):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "apt-get").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return fake


@needs_dpkg
def test_html_of_a_package(build, tmp_path):
    page, text = f"<p>{prose(1)}".encode(), gzip.compress(prose(2).encode())
    source = unpack(build(a_html=page, b_txt_gz=text), tmp_path / "out")
    assert (source.name, source.version) == ("mill-doc", "1:2.3-4")
    assert [path.name for path in source.licences] == ["copyright"]
    (document,), _ = read_documents([source])
    assert document.name == "mill-doc/usr/share/doc/mill-doc/a.html" and document.paragraphs == [prose(1)]


@needs_dpkg
def test_texts_of_a_package_without_html(build, tmp_path):
    source = unpack(build(b_txt_gz=gzip.compress(prose(2).encode())), tmp_path / "out")
    assert [document.paragraphs for document in read_documents([source])[0]] == [[prose(2)]]


@needs_dpkg
def test_packages_are_fetched_and_gone_afterwards(build, fake_apt):
    package = build(a_html=f"<p>{prose(1)}".encode())
    fake_apt(f'test "$1" = download && cp {package} "$2.deb"')
    with debian_sources(["mill-doc"]) as (source,):
        assert read_documents([source])[0]
    assert not source.folder.exists()


@needs_dpkg
def test_file_that_is_no_package(tmp_path):
    (tmp_path / "a.deb").write_text("no package")
    with pytest.raises(UserError, match="dpkg-deb does not unpack .*a.deb: [a-z ]+"):
        unpack(tmp_path / "a.deb", tmp_path / "out")


def test_package_that_apt_does_not_know(fake_apt, tmp_path):
    fake_apt("echo 'W: a warning' >&2; echo 'E: Unable to locate package no-doc' >&2; exit 100")
    message = "apt-get does not get the package no-doc: Unable to locate package no-doc; see .*--documents"
    with pytest.raises(UserError, match=message):
        fetch("no-doc", tmp_path)


@pytest.mark.parametrize("name", ["-oDebug=1", "Mill", "../mill", ""])
def test_names_that_are_no_packages(name, tmp_path):
    with pytest.raises(UserError, match="is not the name of a Debian package"):
        fetch(name, tmp_path)


def test_missing_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get is not installed, .*--documents, which takes any folder"):
        fetch("mill-doc", tmp_path)
    with pytest.raises(UserError, match="dpkg-deb is not installed, .*--documents, which takes any folder"):
        unpack(tmp_path / "a.deb", tmp_path / "out")
