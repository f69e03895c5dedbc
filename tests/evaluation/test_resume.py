"""Evaluations that are killed, repeated and shared."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from xtuner_ext.cli.main import run
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.processes import Processes
from xtuner_ext.evaluation.resume import Partial, answer_all
from xtuner_ext.evaluation.runner import Batches, read_questions

FACTS = {"model": "m", "batch_size": 2}


@pytest.fixture
def start(repository, digits, tiny_teacher, tmp_path):
    """Function that starts `xtuner-ext eval` in processes of its own; ``asked`` then lists what was asked."""

    def start(out, processes=1, die=0):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = ["eval", str(tiny_teacher), "--data", str(digits / "test.json"), "--out", str(out)]
        script = str(repository / "tests" / "evaluation" / "killed.py")
        command = [sys.executable, *(launch if processes > 1 else []), script, *words, "--batch-size", "2"]
        path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
        own = {"ASKED": str(tmp_path / "asked"), "DIE": str(die), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)

    return start


def contents(folder):
    """dict: The bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_evaluation_goes_on_in_two_processes_and_ends_in_the_same_bytes(start, digits, tiny_teacher, tmp_path):
    words = ["eval", str(tiny_teacher), "--data", str(digits / "test.json"), "--batch-size", "2"]
    assert run([*words, "--out", str(tmp_path / "whole")]) == 0
    out, partial, asked = tmp_path / "out", tmp_path / "out.partial", tmp_path / "asked"
    assert start(out, die=2).returncode == -9 and not out.exists()
    assert len(asked.read_text().split()) == 4
    # A write that the end of the process tore.
    with open(partial / "answers.0.jsonl", "a") as file:
        file.write('{"batch": 5, "predic')
    done = start(out, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12/12" in done.stderr and not partial.exists()
    assert contents(out) == contents(tmp_path / "whole")
    everything = asked.read_text().split()
    assert len(everything) == len(set(everything)) == 12


def test_answers_of_another_evaluation_are_refused_by_name(digits, tiny_teacher, tmp_path, monkeypatch, capsys):
    answer = Batches.answer

    def stop(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return answer(self, number)

    monkeypatch.setattr(Batches, "answer", stop)
    digits = shutil.copytree(digits, tmp_path / "digits")
    data, out = str(digits / "test.json"), str(tmp_path / "out")
    words = ["eval", str(tiny_teacher), "--data", data, "--out", out, "--batch-size", "2"]
    assert run(words) == 130
    monkeypatch.undo()
    for changed, name in (
        (["--max-new-tokens", "5"], "max_new_tokens is 32 and not 5"),
        (["--limit", "7"], "limit is None and not 7"),
        (["--data", str(digits / "train.json")], "data is '.*test.json' and not '.*train.json'"),
        (["--batch-size", "3"], "batch_size is 2 and not 3"),
    ):
        assert run([*words, *changed]) == 2
        error = capsys.readouterr().err
        assert "out.partial holds answers of another evaluation, whose " in error
        assert all(part in error for part in name.split(".*"))
    questions = digits / "test.jsonl"
    text = questions.read_text()
    questions.write_text(text.replace("?", "!", 1))
    assert run(words) == 2 and "whose questions is" in capsys.readouterr().err
    questions.write_text(text)
    assert run(words) == 0


def test_kept_answers(tmp_path):
    partial = Partial(tmp_path / "p")
    partial.open(FACTS)
    partial.add(3, ["a", "b\n\u2028é"])
    Partial(tmp_path / "p", rank=7).add(0, ["c"])
    with open(partial.file, "a") as file:
        file.write('{"batch": 1')
    partial.open(FACTS)
    partial.add(1, [])
    assert partial.read() == {3: ["a", "b\n\u2028é"], 0: ["c"], 1: []}
    with partial.lock(), pytest.raises(UserError, match="answers.0.jsonl is being written by another command"):
        Partial(tmp_path / "p", rank=5).open(FACTS)
    partial.open(FACTS)
    partial.file.write_text("{}\n")
    with pytest.raises(UserError, match="answers.0.jsonl:1 is broken, expected the answers of a batch"):
        partial.read()
    (partial.folder / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json is not valid JSON: delete .*p to begin anew"):
        partial.open(FACTS)


def test_missing_answers_are_an_error(digits, digits_processor, tiny_model, tmp_path):
    """As of a process that wrote them to a folder that is only its own."""
    from xtuner_ext.data.templates import get_template

    questions = read_questions(digits / "test.json")
    batches = Batches(tiny_model(), digits_processor, get_template("internlm2_chat"), questions, 2, 2)

    class Alone(Processes):
        def wait(self):
            pass

    with pytest.raises(UserError, match="p lacks 6 of 12 answers after all processes have ended, expected a folder"):
        answer_all(batches, Partial(tmp_path / "p"), FACTS, Alone(0, 2))
    assert [len(texts) for texts in answer_all(batches, Partial(tmp_path / "p"), FACTS, Processes())] == [2] * 6
    lines = (tmp_path / "p" / "answers.0.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["batch"] for line in lines) == list(range(6))
