"""What a benchmark is: questions out of its files, how they are asked, how answers are scored and handed in."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..rows import result_row
from .files import Folder

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name (str): Its name on the command line.
        reader (Callable): ``(folder, split) -> questions``.
        marker (Callable): ``(rows, mode) -> [(parsed, correct), ...]``.
        scorer (Callable): ``(rows, mode, strict) -> report``.
        settings (dict): How InternVL's kit asks: ``max_new_tokens``, ``min_new_tokens``, ``max_tiles``; always greedy.
        files (tuple[str, ...]): What must be where, in words.
        splits (tuple[str, ...]): Known splits, the first is the default.
        subfolders (tuple[str, ...]): Names of its folder in the usual kits.
        upload (Callable | None): ``(rows, path, split)`` writes what its server takes.
        suffix (str): File name extension of the upload.
    """

    name: str
    reader: Callable[..., Any]
    marker: Callable[..., Any]
    scorer: Callable[..., Any]
    settings: dict
    files: tuple
    splits: tuple
    subfolders: tuple
    upload: Callable[..., Any] | None = None
    suffix: str = ".json"

    def read(self, data, split=None):
        """Read the questions.

        Args:
            data (str | Path): Folder of the files, or a single file of questions in the benchmark's format.
            split (str, optional): One of :attr:`splits`; the first when absent.

        Returns:
            list[dict]: As :func:`read_questions` gives them, with ``meta`` beside: ``id``, ``turns``, ``images`` (paths
            and :class:`EmbeddedImage`), ``video`` and ``clip`` (None), ``system`` (None), ``gold``, ``category``,
            ``where``, ``meta``. A result row takes over ``id``, ``gold``, ``category`` and, in its own meta, ``meta``.

        Raises:
            UserError: For an unknown split, a missing file, one that is not in the benchmark's format, or no question.
        """
        split = self.splits[0] if split is None else split
        if split not in self.splits:
            raise UserError(f"{self.name} has no split {split!r}, expected one of {', '.join(self.splits)}")
        folder = Folder(self.name, data, self.subfolders, self.files)
        try:
            questions = self.reader(folder, split)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            # Valid JSON of another form: what it lacks is all that can be said.
            problem = f"{type(error).__name__}: {error}"
            raise UserError(f"{data} is not in the format of {self.name}, split {split} ({problem})") from error
        if not questions:
            raise UserError(f"{data} has no question of {self.name}, split {split}")
        seen = {}
        for question in questions:
            if (other := seen.setdefault(str(question["id"]), question)) is not question:
                raise UserError(f"{question['where']}: id {question['id']!r} is that of {other['where']} as well")
        return questions

    def join(self, questions, rows):
        """Give every question its result row, whatever their order.

        Args:
            questions (list[dict]): Of :meth:`read`.
            rows (list[dict]): Result rows.

        Returns:
            list[dict]: One row a question, in the order of the questions; ``prediction`` is None where none was given.

        Raises:
            UserError: For two rows of one id, or a row of no question.
        """
        known, found = {str(question["id"]) for question in questions}, {}
        for row in rows:
            key = str(row["id"])
            if key in found or key not in known:
                problem = "has two result rows" if key in found else "is in a result row, but in no question"
                raise UserError(f"id {row['id']!r} of {self.name} {problem}")
            found[key] = row
        return [found.get(str(question["id"])) or result_row(question, None, None) for question in questions]

    def mark(self, rows, mode="robust", **options):
        """list[dict]: The rows with ``parsed`` and ``correct`` (True, False, or a share) as this scorer has them."""
        marks = self.marker(rows, mode, **options)
        return [{**row, "parsed": parsed, "correct": correct} for row, (parsed, correct) in zip(rows, marks)]

    def score(self, rows, mode="robust", strict=False, **options):
        """dict: The report on joined rows, see :func:`xtuner_ext.evaluation.scorers.common.report`.

        Options are the scorer's own: ``consistency`` of GQA, ``box_format`` of RefCOCO (of :meth:`mark` as well).
        """
        return self.scorer(rows, mode, strict, **options)

    def submission(self, rows, path, split=None):
        """Write what the benchmark's server takes.

        Args:
            rows (list[dict]): Joined rows.
            path (str | Path): File to write, with :attr:`suffix`.
            split (str, optional): One of :attr:`splits`; the first when absent.

        Raises:
            UserError: For a benchmark without a server.
        """
        if self.upload is None:
            raise UserError(f"{self.name} has no upload format, it is scored here")
        self.upload(rows, Path(path), self.splits[0] if split is None else split)


def question(number, text, images, gold, where, category="all", **meta):
    """dict: A question in the form of :meth:`Benchmark.read`; the text holds a placeholder for each image."""
    return {
        "id": number,
        "turns": [(text, None)],
        "images": images,
        "video": None,
        "clip": None,
        "system": None,
        "gold": gold,
        "category": category,
        "where": where,
        "meta": meta,
    }
