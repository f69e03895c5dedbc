"""Answers that are kept as they come, so that a killed evaluation asks nothing twice."""

import contextlib
import fcntl
import json
import os
from pathlib import Path

from ..errors import UserError

FACTS = "settings.json"


class Partial:
    """The folder of an evaluation that is under way: what it is, and the answers so far.

    Every process appends to a file of its own, a whole batch a line. A line that the end of a process tore is dropped,
    and its batch asked again.

    Args:
        folder (str | Path): Where it is.
        rank (int): The number of this process.
    """

    def __init__(self, folder, rank=0):
        self.folder = Path(folder)
        self.file = self.folder / f"answers.{rank}.jsonl"

    def open(self, facts):
        """Begin, or insist that what is there is of the same evaluation; one process does so before any other reads.

        Args:
            facts (dict): What the answers follow from, by name, as JSON can hold it.

        Raises:
            UserError: When the folder is another evaluation's, broken, or written to by a running command.
        """
        path, facts = self.folder / FACTS, json.loads(json.dumps(facts))
        if path.is_file():
            self._compare(path, facts)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".new")
            _write(draft, "w", json.dumps(facts, indent=2))
            draft.replace(path)
        for file in self._files():
            with _locked(file):
                os.truncate(file, file.read_bytes().rfind(b"\n") + 1)

    def lock(self):
        """Context manager: this process alone writes its file; a UserError where another one does."""
        return _locked(self.file)

    def _compare(self, path, facts):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: delete {self.folder} to begin anew") from error
        for name in {**found, **facts}:
            if found.get(name) != facts.get(name):
                raise UserError(
                    f"{self.folder} holds answers of another evaluation, whose {name} is {found.get(name)!r} and not "
                    f"{facts.get(name)!r}: repeat its command, or delete the folder to begin anew"
                )

    def _files(self):
        return sorted(self.folder.glob("answers.*.jsonl"))

    def read(self):
        """dict[int, list[str]]: The answers so far, by batch; a UserError for a broken line."""
        found = {}
        for file in self._files():
            for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], start=1):
                try:
                    item = json.loads(line)
                    found[item["batch"]] = item["predictions"]
                except (ValueError, KeyError, TypeError) as error:
                    message = f"{file}:{number} is broken, expected the answers of a batch"
                    raise UserError(f"{message}: delete {self.folder} to begin anew") from error
        return found

    def add(self, batch, predictions):
        """Keep the answers of one batch, also through a loss of power.

        Args:
            batch (int): Its number.
            predictions (list[str]): Its answers.
        """
        _write(self.file, "a", json.dumps({"batch": batch, "predictions": predictions}) + "\n")


def answer_all(batches, partial, facts, processes, on_batch=None):
    """Answer what is not answered yet, together with the other processes.

    Args:
        batches (Batches): The questions.
        partial (Partial): Where answers are kept.
        facts (dict): What the answers follow from.
        processes (Processes): This process among all.
        on_batch (callable, optional): Called with the number of questions finished, here or by an earlier command;
            every process takes the others to be as fast.

    Returns:
        list[list[str]] | None: The answers to every batch in the first process, None in the others.

    Raises:
        UserError: When answers are missing at the end, or the folder is another evaluation's.
    """
    on_batch = on_batch or (lambda count: None)
    first = processes.rank == 0
    if first:
        partial.open(facts)
    processes.wait()
    known = partial.read()
    # Nobody writes before all have read, so that all see the same work.
    processes.wait()
    if known:
        on_batch(sum(map(len, known.values())))
    left = [number for number in range(len(batches)) if number not in known]
    with partial.lock():
        for start in range(0, len(left), processes.count):
            together = left[start : start + processes.count]
            if processes.rank < len(together):
                number = together[processes.rank]
                partial.add(number, batches.answer(number))
            on_batch(sum(len(batches.members[number]) for number in together))
    processes.wait()
    if not first:
        return None
    found = partial.read()
    lost = [number for number in range(len(batches)) if len(found.get(number, ())) != len(batches.members[number])]
    if lost:
        count = sum(len(batches.members[number]) for number in lost)
        raise UserError(
            f"{partial.folder} lacks {count} of {len(batches.questions)} answers after all processes have ended, "
            "expected a folder that all of them share; repeat the command to ask the rest"
        )
    return [found[number] for number in range(len(batches))]


@contextlib.contextmanager
def _locked(path):
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path} is being written by another command, wait for it or end it") from error
        except OSError:
            pass  # a file system that knows no locks
        yield


def _write(path, mode, text):
    with open(path, mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
