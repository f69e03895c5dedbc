"""What can be asked of a model: annotated questions, or a benchmark."""

import hashlib
import json

from . import benchmarks
from .rows import choose, write_rows
from .runner import read_questions
from .scorers import mark_rows, score_rows
from .scorers.common import MODES

BOTH = "both"


class MetaTask:
    """Annotated questions, scored by exact match.

    Args:
        data (str): Meta JSON of the questions.
        limit (int, optional): How many are asked.
        seed (int, optional): Draws them; they are the first ones when absent.

    Raises:
        UserError: For annotations that are broken or ask nothing.
    """

    settings = {"max_new_tokens": 32}
    scorer = "exact_match"
    facts = {}
    modes = ()

    def __init__(self, data, limit=None, seed=None):
        whole = read_questions(data, limit if seed is None else None)
        self.data, self.questions = data, choose(whole, limit, seed)

    def limit_tiles(self, processor, max_tiles=None):
        """Give the questions a tile limit instead of their data's, where there is one."""
        if max_tiles is not None:
            self.questions = [{**question, "max_tiles": max_tiles} for question in self.questions]

    def score(self, rows):
        """tuple[list[dict], dict]: The marked rows and their scores."""
        rows = mark_rows(rows)
        return rows, score_rows(rows)

    def write(self, folder, rows):
        """Write the rows."""
        write_rows(folder / "rows.jsonl", rows)


class BenchmarkTask:
    """A benchmark, scored as its kit does and sanely.

    Args:
        name (str): One of :data:`benchmarks.BENCHMARKS`.
        data (str): Folder of its files, or a file of questions.
        split (str, optional): One of its splits; the first when absent.
        mode (str): ``reference``, ``robust`` or ``both``.
        limit (int, optional): How many questions are asked.
        seed (int, optional): Draws them; they are the first ones when absent.

    Raises:
        UserError: For an unknown name or split, or files that are missing or broken.
    """

    def __init__(self, name, data, split=None, mode=BOTH, limit=None, seed=None):
        self.benchmark, self.data = benchmarks.get(name), data
        self.split = split or self.benchmark.splits[0]
        whole = self.benchmark.read(data, self.split)
        self.questions = choose(whole, limit, seed)
        self.modes = MODES if mode == BOTH else (mode,)
        self.settings, self.scorer = self.benchmark.settings, self.benchmark.name
        self.facts = {"benchmark": self.benchmark.name, "split": self.split, "questions_of_split": len(whole)}

    def limit_tiles(self, processor, max_tiles=None):
        """Give the questions the tile limit of the benchmark's kit, if the model cuts images in tiles at all."""
        limit = max_tiles or (self.settings["max_tiles"] if processor.max_tiles > 1 else None)
        self.questions = [{**question, "max_tiles": limit} for question in self.questions]

    def score(self, rows):
        """Mark and score.

        Args:
            rows (list[dict]): Result rows; of questions that have none the answer is missing, which is wrong.

        Returns:
            tuple[list[dict], dict]: The rows, marked in the last mode, with ``reference`` in the meta of those that
            are marked otherwise there; and ``count`` and the ``reports`` by mode.
        """
        # Kits cut blanks off an answer before they score it.
        rows = [row if row["prediction"] is None else {**row, "prediction": row["prediction"].strip()} for row in rows]
        rows = self.benchmark.join(self.questions, rows)
        reports = {mode: self.benchmark.score(rows, mode) for mode in self.modes}
        marked = self.benchmark.mark(rows, self.modes[-1])
        if len(self.modes) > 1:
            other = self.benchmark.mark(rows, self.modes[0])
            marked = [_with_reference(row, reference) for row, reference in zip(marked, other)]
        return marked, {"count": len(rows), "mode": BOTH if len(self.modes) > 1 else self.modes[0], "reports": reports}

    def write(self, folder, rows):
        """Write the rows and, of a whole split that has a server, what is handed in."""
        write_rows(folder / "rows.jsonl", rows)
        if self.benchmark.upload is not None and len(rows) == self.facts["questions_of_split"]:
            self.benchmark.submission(rows, folder / f"submission{self.benchmark.suffix}", self.split)


def _with_reference(row, reference):
    marks = {key: reference[key] for key in ("parsed", "correct")}
    if all(row[key] == value for key, value in marks.items()):
        return row
    return {**row, "meta": {**row["meta"], MODES[0]: marks}}


def digest(questions):
    """str: A name of what is asked: the same questions about images of the same names have the same."""
    found = hashlib.sha256()
    for question in questions:
        found.update(json.dumps(question, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:16]


def digest_folder(folder):
    """str: A name of the files of a model, by their names, sizes and times."""
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    facts = [(name, found.st_size, found.st_mtime_ns) for name, found in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
