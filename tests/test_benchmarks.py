"""The benchmarks' rows say what they change, and one failure ends a benchmark."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ablation  # noqa: E402
import kl  # noqa: E402
import ssd as ssd_benchmark  # noqa: E402
import stages  # noqa: E402
import step  # noqa: E402
import training  # noqa: E402

from xtuner_ext.cli.config_options import load_config, parse_options  # noqa: E402
from xtuner_ext.ops import causal_conv, ssd, ssd_step  # noqa: E402

STAGES = ("stage1", "stage2", "stage3_linear")
ROWS = [(teacher, name) for teacher, rows in ablation.VARIANTS.items() for name in list(rows)[1:]]


def value(config, key):
    node = config
    for part in key.split("."):
        node = node[int(part)] if part.isdigit() else node[part]
    return node


@pytest.mark.parametrize("teacher, name", ROWS, ids=[f"{teacher}: {name}" for teacher, name in ROWS])
def test_a_row_differs_from_the_first_one_in_what_it_sets(teacher, name):
    first, changes, changed = next(iter(ablation.VARIANTS[teacher].values())), ablation.VARIANTS[teacher][name], []
    for number, stage in enumerate(STAGES, start=1):
        path = str(training.project_file(f"mmmamba/{teacher}/{stage}"))
        before, after = ({**row.get("all", {}), **row.get(str(number), {})} for row in (first, changes))
        keys, pairs = {*before, *after}, training._pairs({**training.schedule(30), **after})
        before, after = load_config(path, training._pairs(before)), load_config(path, pairs)
        for key, wanted in parse_options(pairs).items():
            assert value(after, key) == wanted
        changed += [key for key in keys if value(before, key) != value(after, key)]
    assert changed


@pytest.fixture
def small_step(monkeypatch):
    """Two layers of a small model, and a row of 48 tokens."""
    monkeypatch.setattr(step.distill_model, "local_backward", step.LOCAL)
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    monkeypatch.setattr(step, "SMOLLM2", {**step.SMOLLM2, **sizes})
    args = SimpleNamespace(device="cpu", dtype="float32", stage=2)
    return args, step.build(args, 2), step.tokens(args, 48)


def test_the_steps_that_are_compared_compute_the_same_gradients(small_step):
    args, model, ids = small_step
    assert step.difference(args, 2, 48) == 0.0
    found = []
    for variant in ("local", "reference"):
        step.step(model, ids, variant)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert found[0].norm() > 0 and (found[0] - found[1]).norm() < 1e-4 * found[0].norm()


def test_saved_bytes_follow_the_depth_only_where_graphs_are_kept(small_step, monkeypatch):
    args, *_ = small_step
    monkeypatch.setattr(step, "peak_growth", lambda device, call: call())
    saved = {v: [step.memory_of_step(args, v, layers, 64)[1] for layers in (1, 4)] for v in ("local", "kept")}
    # One layer's graph at a time, and the sum of the errors.
    assert saved["local"][1] < 1.05 * saved["local"][0]
    assert 3.5 * saved["kept"][0] < saved["kept"][1] < 4.5 * saved["kept"][0]


@pytest.mark.parametrize("train_head", [False, True])
def test_the_losses_that_are_compared_have_the_same_gradients(train_head):
    args = SimpleNamespace(device="cpu", dtype="float32", width=16, vocabulary=99)
    inputs = kl.make_inputs(args, 40, 0.4, train_head)
    ours, theirs = (kl.step(kl.LOSSES[name], inputs) for name in ("ours", "full logits"))
    assert len(ours) == 1 + train_head and kl.distance(ours, theirs) < 1e-5


def test_the_first_failure_is_raised_and_what_has_not_begun_is_left_out():
    begun = []

    def train(number):
        begun.append(number)
        time.sleep(0.02 * number)
        sys.exit(f"training {number} failed")

    with ThreadPoolExecutor(1) as pool, pytest.raises(SystemExit, match="training 0 failed"):
        training.collect(pool, [pool.submit(train, number) for number in range(50)])
    assert len(begun) < 50


BASE = """
model = dict(lr=1.0, seed=0)
train_cfg = dict(max_iters=1)
param_scheduler = [dict(end=1), dict(begin=1, end=2)]
default_hooks = dict(checkpoint=dict(interval=1))
"""


def test_a_finished_run_is_reused_only_for_the_same_resolved_recipe(monkeypatch, tmp_path):
    """A run is known by all that its config inherits, and by the stage before it."""
    projects, runs = tmp_path / "projects", []
    projects.mkdir()
    (projects / "_base_.py").write_text(BASE)
    head = "from mmengine.config import read_base\n\nwith read_base():\n    from ._base_ import *\n\n"
    (projects / "stage1.py").write_text(head + "previous_stage = None\n")
    (projects / "stage2.py").write_text(head + 'previous_stage = "stage1"\n')

    def run(verb, path, _, work_dir, *arguments):
        runs.append(work_dir.name)
        work_dir.mkdir(exist_ok=True)
        (work_dir / "iter_30.pth").touch()

    monkeypatch.setattr(training, "project_file", lambda config: projects / f"{config}.py")
    monkeypatch.setattr(training, "run", run)

    def train_both(first=None, second=None):
        del runs[:]
        training.train("stage1", tmp_path / "stage1", 30, first)
        training.train("stage2", tmp_path / "stage2", 30, second)
        return runs

    assert train_both() == ["stage1", "stage2"]
    assert train_both() == []
    assert train_both(second={"model.lr": 2.0}) == ["stage2"]
    assert train_both(second={"model.lr": 2.0}) == []
    assert train_both(first={"model.lr": 3.0}, second={"model.lr": 2.0}) == ["stage1", "stage2"]
    base = projects / "_base_.py"
    base.write_text(base.read_text().replace("lr=1.0", "lr=0.5"))
    assert train_both(first={"model.lr": 3.0}, second={"model.lr": 2.0}) == []
    assert train_both(second={"model.lr": 2.0}) == ["stage1", "stage2"]


def test_the_ablations_claim_compares_the_shipped_recipe_with_the_best_other_row():
    rows = {name: [{"kl": 0.2}] for name in list(ablation.VARIANTS["smollm2"])[:3]}
    rows[list(rows)[0]] = [{"kl": 0.1}, {"kl": 0.3}]
    (claim,) = ablation.claims(rows, "smollm2")
    assert claim["value"] == pytest.approx(1.0) and claim["holds"]
    rows[list(rows)[1]] = [{"kl": 0.1}]
    (claim,) = ablation.claims(rows, "smollm2")
    assert claim["value"] == pytest.approx(2.0) and not claim["holds"]
    assert ablation.claims({list(rows)[0]: rows[list(rows)[0]]}, "smollm2") == []


def test_what_the_scan_is_timed_against_does_the_same():
    arguments = {name: t.detach() for name, t in ssd_benchmark.inputs(70, heads=2, width=8, state=4).items()}
    torch.testing.assert_close(ssd_benchmark.transformers_scan(**arguments, chunk_size=32), ssd(**arguments))
    row = {"x": torch.randn(2, 9, 6), "weight": torch.randn(6, 4), "bias": torch.randn(6)}
    torch.testing.assert_close(ssd_benchmark.transformers_convolution(**row), causal_conv(**row))
    token = {name: t if t.ndim == 1 else t[:, 0] for name, t in arguments.items()}
    theirs, ours = (torch.full((1, 2, 8, 4), 0.5) for _ in range(2))
    y = ssd_benchmark.transformers_step(**token, state=theirs)
    torch.testing.assert_close(y, ssd_step(**token, state=ours, in_place=True)[0])
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize(
    "value, larger, holds",
    [(3.0, True, True), (2.9, True, False), (3.1, False, False), (float("nan"), False, False)],
)
def test_a_claim_holds_on_its_side_of_the_bar(value, larger, holds):
    assert ssd_benchmark.claim("name", value, 3.0, larger)["holds"] is holds


def test_every_stage_is_timed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stages.py", "--shape", "tiny", "--length", "16", "--batch", "1", "--repeats", "1"])
    local = stages.distill_model.local_backward
    try:
        stages.main()
    finally:
        stages.distill_model.local_backward = local
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [name for name, *_ in stages.CASES]
    assert all(float(row.split(" | ")[2].replace(",", "")) > 0 for row in rows)
