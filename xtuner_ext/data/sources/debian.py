"""Documentation packages of a Debian system, fetched and unpacked without root."""

import contextlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ...errors import UserError
from .documents import Source
from .prose import markup

# Running English of a few megabytes that several releases carry: a book on the culture of computing, one on
# an image format, one on reading mail, and manuals.
PACKAGES = (
    *("cfi-en", "png-definitive-guide", "mh-book", "git-doc"),
    *("debian-reference-en", "debian-faq", "developers-reference"),
)
INSTEAD = "or give --documents, which takes any folder of texts"


@contextlib.contextmanager
def debian_sources(packages):
    """Fetch and unpack packages for as long as they are read.

    Args:
        packages (Iterable[str]): Package names.

    Yields:
        list[Source]: One per package.

    Raises:
        UserError: When a tool or a package is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield [unpack(fetch(package, folder), Path(folder) / package) for package in packages]


def fetch(package, folder):
    """Download a package.

    Args:
        package (str): Its name.
        folder (str | Path): Where the file goes.

    Returns:
        Path: The ``.deb`` file.

    Raises:
        UserError: When apt-get is missing or does not get the package.
    """
    # apt-get takes what begins with a hyphen for an option.
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", package):
        raise UserError(f"{package!r} is not the name of a Debian package, {INSTEAD}")
    before = set(Path(folder).glob("*.deb"))
    done = _run("apt-get", "download", package, cwd=folder)
    found = set(Path(folder).glob("*.deb")) - before
    if done.returncode or len(found) != 1:
        raise UserError(f"apt-get does not get the package {package}: {_reason(done)}; see `apt-get update`, {INSTEAD}")
    return found.pop()


def unpack(package, folder):
    """Unpack a ``.deb`` file.

    Args:
        package (Path): The file.
        folder (Path): Folder to create.

    Returns:
        Source: Its documents; where a package has HTML, its other files are mostly the same text and are
        left out.

    Raises:
        UserError: When dpkg-deb is missing or the file is no package.
    """
    for done in (
        _run("dpkg-deb", "-x", str(package), str(folder)),
        shown := _run("dpkg-deb", "--show", "--showformat", "${Package} ${Version}", str(package)),
    ):
        if done.returncode:
            raise UserError(f"dpkg-deb does not unpack {package}: {_reason(done)}")
    name, version = shown.stdout.split()
    source = Source.from_folder(folder, name, version)
    pages = [path for path in source.files if markup(path) == "html"]
    source.files = pages or source.files
    return source


def _run(tool, *arguments, cwd=None):
    if shutil.which(tool) is None:
        raise UserError(f"{tool} is not installed, it is needed to read Debian packages; install it, {INSTEAD}")
    return subprocess.run([tool, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def _reason(done):
    # apt-get warns before it names the error.
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("W:")]
    return re.sub("^(E: |dpkg-deb: error: )", "", lines[-1]) if lines else f"status {done.returncode}"
