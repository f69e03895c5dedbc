"""The benchmarks' rows say what they change, and one failure ends a benchmark."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ablation  # noqa: E402
import training  # noqa: E402

from xtuner_ext.cli.config_options import load_config, parse_options  # noqa: E402

STAGES = ("stage1", "stage2", "stage3_linear")
ROWS = [(teacher, name) for teacher, rows in ablation.VARIANTS.items() for name in rows if name != "improved recipe"]


def value(config, key):
    node = config
    for part in key.split("."):
        node = node[int(part)] if part.isdigit() else node[part]
    return node


@pytest.mark.parametrize("teacher, name", ROWS, ids=" ".join)
def test_a_row_changes_what_it_names(teacher, name):
    changes, changed = ablation.VARIANTS[teacher][name], []
    for number, stage in enumerate(STAGES, start=1):
        path = str(training.project_file(f"mmmamba/{teacher}/{stage}"))
        options = {**changes.get("all", {}), **changes.get(str(number), {})}
        pairs = training._pairs({**training.schedule(30), **options})
        before, after = load_config(path), load_config(path, pairs)
        for key, wanted in parse_options(pairs).items():
            assert value(after, key) == wanted
        changed += [key for key in options if value(before, key) != value(after, key)]
    assert set(changed) == {key for stage in changes.values() for key in stage}


def test_the_first_failure_is_raised_and_what_has_not_begun_is_left_out():
    begun = []

    def train(number):
        begun.append(number)
        time.sleep(0.02 * number)
        sys.exit(f"training {number} failed")

    with ThreadPoolExecutor(1) as pool, pytest.raises(SystemExit, match="training 0 failed"):
        training.collect(pool, [pool.submit(train, number) for number in range(50)])
    assert len(begun) < 50
