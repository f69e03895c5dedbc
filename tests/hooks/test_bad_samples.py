"""Runs over data with a few bad samples: they train, count exactly and end; or end in one sentence."""

import json
import logging
import os
import subprocess
from types import SimpleNamespace

import pytest
from mmengine.logging import MessageHub, MMLogger
from PIL import Image

from tests.data.malformed import GOOD, LINE_CASES, asks, write
from xtuner_ext.cli.main import run
from xtuner_ext.data.ledger import Skipped
from xtuner_ext.errors import UserError
from xtuner_ext.hooks import BadSampleHook

LINES = 300
CONFIG = """
from mmengine.config import read_base
from xtuner_ext.data.packing import PackedDataset
from xtuner_ext.data.samplers import LengthGroupedSampler
from xtuner_ext.hooks import BadSampleHook

with read_base():
    from .stage1 import *

train_dataloader["dataset"].update(
    meta=mixed, max_length=200, max_bad_fraction=0.02, frames=dict(min_frames=2, max_frames=4)
)
train_dataloader.update(num_workers=2, sampler=dict(type=ResumableInfiniteSampler, shuffle=True))
train_cfg.update(max_iters=75)
default_hooks["logger"].update(interval=20)
default_hooks["checkpoint"].update(interval=10)
custom_hooks = [dict(type=BadSampleHook)]
"""
PACKED = CONFIG + """
train_dataloader["dataset"] = dict(type=PackedDataset, dataset=train_dataloader["dataset"], row_length=200)
train_dataloader["batch_size"] = 2
"""
GROUPED = CONFIG + 'train_dataloader["sampler"] = dict(type=LengthGroupedSampler, batch_size=4, batches=5)\n'


@pytest.fixture(scope="session")
def mixed(tmp_path_factory):
    """Folder of two datasets of all kinds, 300 lines of which three are bad, and what must be said of these."""
    folder = tmp_path_factory.mktemp("mixed")
    write(folder, LINE_CASES[0])
    Image.new("RGB", (32, 32), "red").save(folder / "images" / "red.png")
    several = asks("<image> and <image>?", image=["images/red.png", "images/good.png"])
    good = [json.dumps(line) for line in (*GOOD, several)]
    lines = [good[number % len(good)] for number in range(LINES)]
    lines[17] = '{"text": "cut'
    lines[120] = json.dumps(asks(image="images/cut.jpg"))
    lines[250] = json.dumps(asks("word " * 300))
    for name, part in (("first", lines[:180]), ("second", lines[180:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    meta = {name: {"annotation": f"{name}.jsonl"} for name in ("first", "second")}
    (folder / "mixed.json").write_text(json.dumps(meta))
    return folder


EXPECTED = {("first", 18, "json"), ("first", 121, "unreadable_image"), ("second", 71, "too_long")}


@pytest.fixture
def project(small_project, mixed, monkeypatch):
    """The small project's folder with configs of the mixed data."""
    with open(small_project / "_paths.py", "a") as file:
        file.write(f"mixed = {str(mixed / 'mixed.json')!r}\n")
    for name, text in (("plain", CONFIG), ("packed", PACKED), ("grouped", GROUPED)):
        (small_project / f"{name}.py").write_text(text)
    return small_project


def train(project, work_dir, *options, name="plain"):
    extra = ["--cfg-options", *options] if options else []
    return run(["train", str(project / f"{name}.py"), "--work-dir", str(work_dir), *extra])


def entries(work_dir):
    return [json.loads(line) for line in open(work_dir / "bad_samples.jsonl", encoding="utf-8")]


def check(work_dir, mixed):
    found = entries(work_dir)
    assert {(entry["dataset"], entry["line"], entry["reason"]) for entry in found} == EXPECTED
    assert len(found) == len(EXPECTED)
    for entry in found:
        assert entry["file"] == str(mixed / f"{entry['dataset']}.jsonl")
        assert entry["message"].startswith(f"{entry['file']}:{entry['line']}: ")


def logged(work_dir):
    return next(work_dir.glob("*/*.log")).read_text()


# The rows' pass is followed by a part of the next.
@pytest.mark.parametrize("name, iterations, workers", [("plain", 75, 2), ("grouped", 75, 0), ("packed", 60, 0)])
def test_a_run_trains_counts_exactly_and_ends(project, mixed, tmp_path, name, iterations, workers):
    options = [f"train_cfg.max_iters={iterations}", f"train_dataloader.num_workers={workers}"]
    assert train(project, tmp_path / "run", *options, name=name) == 0
    check(tmp_path / "run", mixed)
    assert (tmp_path / "run" / f"iter_{iterations}.pth").is_file()
    log = logged(tmp_path / "run")
    # The long line is in no row, so a packed run does not look at it again.
    looked_at = 298 if name == "packed" else 299
    assert f"3 bad samples, {looked_at} lines looked at: first: 1 json, 1 unreadable_image; " in log
    assert "second: 1 too_long" in log


def test_two_processes_count_what_one_counts(project, mixed, tmp_path, scripts):
    options = ["--cfg-options", "train_cfg.max_iters=38", "train_dataloader.num_workers=1"]
    argv = [f"{scripts}/xtuner-ext", "train", str(project / "plain.py"), "--work-dir", str(tmp_path / "run"), *options]
    environment = {**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    check(tmp_path / "run", mixed)
    assert "3 bad samples, 299 lines looked at" in logged(tmp_path / "run")

    stop = [*argv, "train_dataloader.dataset.max_bad_fraction=0.005"]
    done = subprocess.run(stop, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "more than max_bad_fraction=0.005" in done.stderr


def test_a_resumed_run_counts_nothing_twice_and_forgets_nothing(project, mixed, tmp_path):
    work_dir, alone = tmp_path / "run", "train_dataloader.num_workers=0"
    assert train(project, work_dir, "train_cfg.max_iters=50", alone) == 0
    before = entries(work_dir)
    # The run goes on from iteration 40, after which it had met more and was killed while it wrote.
    (work_dir / "iter_50.pth").unlink()
    with open(work_dir / "bad_samples.jsonl", "a") as file:
        file.write('{"dataset": "sec')
    assert train(project, work_dir, alone) == 0
    check(work_dir, mixed)
    assert entries(work_dir)[: len(before)] == before
    logs = sorted(path.read_text() for path in work_dir.glob("*/*.log"))
    assert any("3 bad samples, 299 lines looked at" in log for log in logs)
    # Further passes meet the same ones.
    assert train(project, work_dir, "train_cfg.max_iters=100", alone) == 0
    check(work_dir, mixed)
    # A new run begins a new file.
    for path in work_dir.glob("*.pth"):
        path.unlink()
    assert train(project, work_dir, "train_cfg.max_iters=1", alone) == 0
    assert [entry["reason"] for entry in entries(work_dir)] == ["json"]


@pytest.mark.parametrize("share, found", [(0.005, "% of"), (0.002, "0.33% of 300 lines")])
def test_above_the_limit_a_run_ends_with_one_sentence(project, tmp_path, capsys, share, found):
    """In training, once enough samples were looked at, and before it where the lines themselves are bad."""
    work_dir = tmp_path / "run"
    assert train(project, work_dir, f"train_dataloader.dataset.max_bad_fraction={share}") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xtuner-ext: error: ")]
    assert found in line and f"are bad samples, more than max_bad_fraction={share}: " in line
    assert "1 json" in line and "first.jsonl:18: malformed JSON" in line
    assert not (work_dir / "iter_75.pth").exists()


def test_a_bad_sample_without_a_limit_ends_the_run(project, tmp_path, capsys):
    assert train(project, tmp_path / "run", "train_dataloader.dataset.max_bad_fraction=None") == 2
    assert "error: " in capsys.readouterr().err


class Runner(SimpleNamespace):
    """What the hook asks of MMEngine's runner."""

    def __init__(self, work_dir, dataset, iteration=0):
        hub = MessageHub(f"hub {id(self)}")
        loader = SimpleNamespace(dataset=dataset)
        super().__init__(work_dir=work_dir, train_dataloader=loader, message_hub=hub, hooks=[], iter=iteration)
        self.max_iters = 9


class Data:
    """A dataset of 1000 lines, some of which were bad when it was opened."""

    def __init__(self, limit, bad=0):
        self.max_bad_fraction, self.sources = limit, [(None, range(1000))]
        self.bad = [bad_line(number) for number in range(bad)]


def bad_line(number):
    return Skipped("d", "d.jsonl", number + 1, "json", f"d.jsonl:{number + 1}: \u2028 odd")


def batch(looked_at, skipped=()):
    return {"data_samples": {"looked_at": [(0, line) for line in looked_at], "skipped": list(map(bad_line, skipped))}}


def test_the_share_is_of_distinct_samples_and_waits_for_a_hundred(tmp_path):
    hook, runner = BadSampleHook(interval=1), Runner(tmp_path, Data(0.05))
    hook.before_train(runner)
    for _ in range(50):
        hook.after_train_iter(runner, 0, batch(range(99), range(9)))
    assert len(entries(tmp_path)) == 9
    message = "^9.00% of 100 samples are bad samples, .*=0.05: 9 json; the first is d.jsonl:1"
    with pytest.raises(UserError, match=message):
        hook.after_train_iter(runner, 0, batch([99]))
    # At the end it waits no longer.
    hook, runner = BadSampleHook(interval=100), Runner(tmp_path, Data(0.05))
    hook.before_train(runner)
    hook.after_train_iter(runner, 0, batch(range(10), [3]))
    with pytest.raises(UserError, match="10.00% of 10 samples"):
        hook.after_train(runner)


def test_lines_that_were_bad_at_the_beginning_count_among_all_lines(tmp_path):
    """Not among the few that a run has looked at so far."""
    hook, runner = BadSampleHook(interval=1), Runner(tmp_path, Data(0.05, bad=40))
    hook.before_train(runner)
    assert len(entries(tmp_path)) == 40
    hook.after_train_iter(runner, 0, batch(range(40, 140)))
    hook.after_train_iter(runner, 1, batch(range(140, 240), [200]))
    with pytest.raises(UserError, match=r"5.44% of 200 samples"):
        hook.after_train_iter(runner, 2, batch([], [201, 202]))


def test_without_a_limit_what_is_too_long_is_still_written_down(tmp_path):
    hook, runner = BadSampleHook(), Runner(tmp_path, Data(None))
    hook.before_train(runner)
    hook.after_train_iter(runner, 0, batch(range(4), range(3)))
    hook.after_train(runner)
    assert [entry["line"] for entry in entries(tmp_path)] == [1, 2, 3]


def test_batches_that_say_nothing_are_no_samples(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(MMLogger.get_current_instance(), "handlers", [caplog.handler])
    hook, runner = BadSampleHook(), Runner(tmp_path, range(3))
    hook.before_train(runner)
    for one in (None, [1], {"data_samples": None}, {"data_samples": [1]}):
        hook.after_train_iter(runner, 0, one)
    with caplog.at_level(logging.INFO):
        hook.after_train(runner)
    assert "0 bad samples, 0 lines looked at" in caplog.text and not (tmp_path / "bad_samples.jsonl").exists()


def test_an_interval_below_one_is_named():
    with pytest.raises(UserError, match="BadSampleHook.interval is 0, expected at least 1"):
        BadSampleHook(interval=0)
