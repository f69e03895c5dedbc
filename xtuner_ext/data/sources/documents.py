"""Folders of documents, divided into training and held-out ones."""

import dataclasses
import hashlib
import re
from pathlib import Path

from ...errors import UserError
from .prose import MARKUP, markup, read_paragraphs

HELD_OUT_SHARE = 0.15
LICENCE = re.compile(r"(copyright|copying|licen[cs]e|gpl|lgpl|gfdl|fdl)\b", re.IGNORECASE)


@dataclasses.dataclass
class Source:
    """A folder of documents.

    Attributes:
        name (str): Of the folder or package.
        version (str | None): Of the package.
        folder (Path): What document names count from.
        files (list[Path]): Documents.
        licences (list[Path]): Files with the terms.
    """

    name: str
    version: str | None
    folder: Path
    files: list
    licences: list

    @classmethod
    def from_folder(cls, folder, name=None, version=None):
        """Find the documents below a folder.

        Args:
            folder (str | Path): Folder, or a single file.
            name (str, optional): The folder's own when absent.
            version (str, optional): Of the package.

        Returns:
            Source: Its documents in the order of their names; links and hidden files are left out.

        Raises:
            UserError: When it does not exist or holds no document.
        """
        folder = Path(folder)
        if not folder.exists():
            raise UserError(f"{folder} does not exist, expected a folder of documents")
        root = folder if folder.is_dir() else folder.parent
        found = [folder] if folder.is_file() else sorted(folder.rglob("*"))
        found = [
            path
            for path in found
            if path.is_file()
            and not path.is_symlink()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        ]
        licences = [path for path in found if LICENCE.match(path.name)]
        files = [path for path in found if markup(path) and path not in licences]
        if not files:
            kinds = ", ".join(MARKUP)
            raise UserError(f"{name or folder} holds no document, expected files that end in {kinds}, perhaps with .gz")
        return cls(name or folder.resolve().name, version, root, files, licences)


@dataclasses.dataclass(frozen=True)
class Document:
    """A file's prose.

    Attributes:
        name (str): ``source/path``.
        source (str): Name of its source.
        held_out (bool): Whether it is kept from training.
        paragraphs (list[str]): Its running text.
    """

    name: str
    source: str
    held_out: bool
    paragraphs: list


def read_documents(sources, on_file=None):
    """Read every document once.

    A paragraph that an earlier document has, but for case, spaces and marks, is dropped, so that no page
    that exists twice, such as a book's chapters and the whole book, is on both sides of the split.

    Args:
        sources (list[Source]): Where to look.
        on_file (callable, optional): Called with 1 after each file.

    Returns:
        tuple[list[Document], int]: Documents with any prose of their own, and how many had nothing but repetitions.
    """
    documents, seen, repeated = [], set(), 0
    for source in sources:
        for path in source.files:
            found = read_paragraphs(path)
            paragraphs = []
            for paragraph in found:
                key = hashlib.sha256(re.sub(r"\W+", "", paragraph.casefold()).encode()).digest()[:12]
                if key not in seen:
                    seen.add(key)
                    paragraphs.append(paragraph)
            relative = path.relative_to(source.folder).as_posix()
            if paragraphs:
                held_out = share(relative) < HELD_OUT_SHARE
                documents.append(Document(f"{source.name}/{relative}", source.name, held_out, paragraphs))
            repeated += bool(found) and not paragraphs
            if on_file is not None:
                on_file(1)
    return documents, repeated


def share(name):
    """float: A number from 0 to 1 that only depends on a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
