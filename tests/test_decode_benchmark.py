"""The benchmark of decoding measures what it says, and its rows can be drawn."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import decode  # noqa: E402
import report  # noqa: E402

CONTEXTS = [40, 300]


@pytest.fixture(scope="module")
def rows():
    args = Namespace(device="cpu", shape="tiny", contexts=CONTEXTS, repeats=2, batch=2)
    return decode.time_steps(decode.make_runners(args, torch.float32, max(CONTEXTS)), args, bandwidth=10.0)


def test_every_model_has_a_row_a_context_and_takes_the_predicted_bytes(rows):
    models = [("teacher", "growing cache (transformers)"), ("teacher", "static cache"), ("hybrid", "static cache")]
    models.append(("linear", "states"))
    expected = [(*model, context) for model in models for context in CONTEXTS]
    assert [(row["model"], row["path"], row["context"]) for row in rows] == expected
    for row in rows:
        assert row["cache_bytes"] == row["predicted_bytes"] > 0 and row["seconds"] > 0
        assert row["roofline_seconds"] == pytest.approx((row["weight_bytes"] + row["cache_bytes"]) / 1e10)
    assert rows[0]["weight_bytes"] == rows[2]["weight_bytes"]
    teacher, _, linear = (rows[index : index + 2] for index in (2, 4, 6))
    assert teacher[1]["cache_bytes"] * CONTEXTS[0] == teacher[0]["cache_bytes"] * CONTEXTS[1]
    assert linear[0]["cache_bytes"] == linear[1]["cache_bytes"]


@torch.no_grad()
def test_a_step_sees_the_context_that_was_set():
    """On the filled cache, a step gives what the model gives after really reading as many tokens."""
    config = decode.make_config("tiny", "teacher")
    runner = decode.Runner(decode.HybridVLForCausalLM(config).eval(), config, "teacher", "static cache", 64, batch=1)
    ids = torch.randint(0, 256, (1, 50), generator=torch.Generator().manual_seed(0))
    runner.model.prefill(ids, past_key_values=runner.cache)
    runner.token = ids[:, -1:]
    expected = runner.model(ids).logits[:, -1:]
    runner.cache.reset()
    runner.model.prefill(ids, past_key_values=runner.cache)
    torch.testing.assert_close(runner.step(49).logits, expected, rtol=1e-4, atol=1e-4)


def test_misses_are_reported_as_misses(rows):
    slow = [{**row, "seconds": row["context"], "predicted_bytes": 1} for row in rows]
    prefill = {100: [{"seconds": 1.0, "peak_bytes": 100}], 400: [{"seconds": 5.0, "peak_bytes": 300}]}
    found = decode.claims(slow, prefill)
    assert [claim["holds"] for claim in found] == [False] * 4
    assert found[1]["value"] == 8 and found[2]["value"] == 1.25 and found[3]["value"] == 3


def test_figures_are_drawn_from_rows_alone(rows, tmp_path, monkeypatch):
    step = [{"layers": n, "variant": v, "peak_bytes": n * 2**20} for v in ("together", "apart") for n in (2, 8)]
    for name, values in (("decode", rows), ("step", step)):
        (tmp_path / name).write_text(json.dumps(values))
    drawn = []
    for folder in ("once", "again"):
        argv = ["report.py", "--decode", tmp_path / "decode", "--step", tmp_path / "step", "--out", tmp_path / folder]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        report.main()
        files = sorted((tmp_path / folder).iterdir())
        assert [file.name for file in files] == ["depth.svg", "latency.svg", "memory.svg"]
        assert all(ElementTree.parse(file).getroot().tag.endswith("svg") for file in files)
        drawn.append([file.read_bytes() for file in files])
    assert drawn[0] == drawn[1]
