"""Which files are documents, and on which side of the split they are."""

import pytest

from xtuner_ext.data.sources.documents import Source, read_documents, share
from xtuner_ext.errors import UserError

from .conftest import prose


def test_files_of_a_folder(tmp_path):
    names = "b.txt a/c.md .git/d.txt a/LICENSE.txt copyright image.png e.html.gz".split()
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link.txt").symlink_to("b.txt")
    source = Source.from_folder(tmp_path)
    relative = [[path.relative_to(tmp_path).as_posix() for path in paths] for paths in (source.files, source.licences)]
    assert relative == [["a/c.md", "b.txt", "e.html.gz"], ["a/LICENSE.txt", "copyright"]]
    assert (source.name, source.version) == (tmp_path.name, None)


def test_single_file_is_a_source(tmp_path):
    (tmp_path / "a.txt").write_text(prose(0))
    (document,), _ = read_documents([Source.from_folder(tmp_path / "a.txt")])
    assert (document.name, document.paragraphs) == ("a.txt/a.txt", [prose(0)])


def test_folders_without_documents_are_named(tmp_path):
    with pytest.raises(UserError, match="gone does not exist, expected a folder of documents"):
        Source.from_folder(tmp_path / "gone")
    (tmp_path / "a.pdf").touch()
    with pytest.raises(UserError, match=r"holds no document, expected files that end in \.txt, \.md"):
        Source.from_folder(tmp_path)


def test_split_follows_from_the_path_below_the_source(write_documents):
    sources = [Source.from_folder(write_documents("a", 60)), Source.from_folder(write_documents("b", 30, first=30))]
    found, _ = read_documents(sources[:1])
    others, _ = read_documents(sources[1:])
    split = {document.name.removeprefix("a/"): document.held_out for document in found}
    assert {document.name.removeprefix("b/"): document.held_out for document in others}.items() <= split.items()
    assert 3 <= sum(split.values()) <= 16
    assert 0 <= min(map(share, split)) and max(map(share, split)) < 1


def test_repeated_paragraphs_and_documents_are_dropped(tmp_path):
    (tmp_path / "a.html").write_text(f"<p>{prose(1)}<p>{prose(2)}")
    (tmp_path / "b.txt").write_text(f"{prose(2).upper().replace(' ', '  ')}\n\n{prose(3)}")
    (tmp_path / "c.txt").write_text(prose(1))
    (tmp_path / "d.txt").write_text("7 8 9")
    counted = []
    documents, repeated = read_documents([Source.from_folder(tmp_path)], counted.append)
    assert [document.paragraphs for document in documents] == [[prose(1), prose(2)], [prose(3)]]
    assert repeated == 1 and counted == [1] * 4
