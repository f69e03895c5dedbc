"""What one training step computes, keeps and leaves out."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from mmengine.optim import OptimWrapper

from tests.reference.hovle import hovle_config, random_hovle_checkpoint
from xtuner_ext.convert import load_teacher
from xtuner_ext.distill import DistillModel
from xtuner_ext.distill import model as distill_model
from xtuner_ext.distill.autocast import Bfloat16OptimWrapper
from xtuner_ext.errors import UserError

WINDOWED = dict(qk_norm="l2", use_rope=True, window=4, sink=True)
ALIGNMENT = dict(scale=10.0, normalise=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hovle")
    random_hovle_checkpoint(folder, hovle_config(), seed=3)
    return folder


def build(teacher, stage, dtype="float32", **options):
    llm = dict(type=load_teacher, pretrained_model_name_or_path=str(teacher), dtype=dtype)
    return DistillModel(llm=llm, stage=stage, **options).train()


def batch(seed=0):
    """Two rows of 24 tokens with a tile each, the second row padded; the last nine tokens are supervised."""
    generator = torch.Generator().manual_seed(seed)
    image = hovle_config()["embedding_config"]["img_context_token_id"]
    ids = torch.randint(3, image, (2, 24), generator=generator)
    ids[:, 2:6] = image
    labels, mask = ids.clone(), torch.ones_like(ids)
    mask[1, -4:] = 0
    labels[:, :15] = -100
    labels[mask == 0] = -100
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    return dict(input_ids=ids, labels=labels, attention_mask=mask, pixel_values=pixels)


def gradients(model, accumulate=1, bf16=False):
    """Gradients after ``accumulate`` batches, as MMEngine's training loop makes them."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrapper = (Bfloat16OptimWrapper if bf16 else OptimWrapper)(
        torch.optim.SGD(trained.values(), lr=1.0), accumulative_counts=accumulate
    )
    wrapper.initialize_count_status(model, 0, accumulate)
    seen = {}
    # The wrapper clears gradients right after the update.
    wrapper.optimizer.register_step_pre_hook(lambda *_: seen.update({k: p.grad.clone() for k, p in trained.items()}))
    for seed in range(accumulate):
        model.train_step({"data": batch(seed), "data_samples": None}, wrapper)
    assert seen
    return seen


def keep_graphs(compute, parameters):
    return compute()


TRAININGS = {
    "plain": dict(),
    "accumulated": dict(accumulate=4),
    "bf16": dict(bf16=True),
    "bf16-accumulated": dict(accumulate=2, bf16=True),
}
MODELS = {
    "stage1": dict(stage=1),
    "stage2": dict(stage=2, mixer=WINDOWED, alignment=ALIGNMENT),
    "stage2-projections": dict(
        stage=2, mixer=WINDOWED, trainable="projections", alignment=dict(**ALIGNMENT, after_projection=True)
    ),
}


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("trainable_dtype", ["float32", None], ids=str)
def test_local_backward_gives_bit_for_bit_the_gradients_of_keeping_all_graphs(
    teacher, training, options, trainable_dtype, monkeypatch
):
    dtype = "bfloat16" if training.get("bf16") else "float32"
    ours, theirs = (build(teacher, dtype=dtype, trainable_dtype=trainable_dtype, **options) for _ in range(2))
    local = gradients(ours, **training)
    monkeypatch.setattr(distill_model, "local_backward", keep_graphs)
    whole = gradients(theirs, **training)
    assert local.keys() == whole.keys() and all(torch.equal(local[name], whole[name]) for name in whole)


def test_an_accumulation_count_that_is_no_power_of_two_only_rounds(teacher, monkeypatch):
    ours, theirs = (build(teacher, stage=2) for _ in range(2))
    local = gradients(ours, accumulate=3)
    monkeypatch.setattr(distill_model, "local_backward", keep_graphs)
    for name, gradient in gradients(theirs, accumulate=3).items():
        assert (local[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("kind, stage", [("ddp", 2), ("zero2", 1)], ids=["ddp", "deepspeed-zero2"])
def test_two_processes_train_the_same_weights_with_and_without_local_backward(kind, stage, teacher, repository):
    if kind != "ddp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the package deepspeed is not installed")
    script = str(repository / "tests" / "distill" / "steps.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(repository), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*launch, script, kind, str(stage), str(teacher)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert found["weights"] > 10 and found["difference"] == 0.0


@pytest.mark.parametrize("stage", [1, 2])
def test_alignment_runs_each_part_of_the_teacher_once_and_no_head(teacher, stage):
    model, calls = build(teacher, stage, mixer=WINDOWED), []
    layers = model.llm.model.layers
    for index, layer in enumerate(layers):
        layer.mixer.attention.q_proj.register_forward_hook(lambda *_, name=f"attention {index}": calls.append(name))
        layer.mlp.register_forward_hook(lambda *_, name=f"mlp {index}": calls.append(name))
    # What is not there cannot run.
    del model.llm.lm_head, model.llm.model.norm, layers[-1].mlp
    model.compute_loss(**batch())["loss"].backward()
    for index in range(len(layers)):
        # Also in stage 1, where the student shares q, k and v.
        assert calls.count(f"attention {index}") == 1
        assert calls.count(f"mlp {index}") == (index + 1 < len(layers))


@pytest.mark.parametrize("stage", [1, 3])
def test_float16_is_refused_where_gradients_are_taken_before_the_loss_is_scaled(teacher, stage):
    model = build(teacher, stage, dtype="bfloat16")
    with torch.autocast("cpu", dtype=torch.float16):
        if stage == 3:
            assert torch.isfinite(model.compute_loss(**batch())["loss"])
            return
        with pytest.raises(UserError, match="float16, expected bfloat16"):
            model.compute_loss(**batch())


STUDENTS = {
    "linear": dict(mixer=dict(qk_norm="l2", use_rope=True)),
    "hybrid": dict(mixer=dict(qk_norm="l2", use_rope=True), attention_layers=[1]),
    "windowed": dict(mixer=WINDOWED),
    "projections": dict(mixer=WINDOWED, trainable="projections"),
    "all": dict(trainable="all"),
}


class Saved:
    """Bytes that autograd keeps of what runs inside, each storage once."""

    def __init__(self):
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self.storages.values())


@pytest.mark.parametrize("options", STUDENTS.values(), ids=STUDENTS)
def test_checkpointed_activations_give_bit_for_bit_the_same_gradients_from_less(teacher, options):
    found = []
    for checkpointing in (False, True):
        model, calls = build(teacher, 3, use_activation_checkpointing=checkpointing, **options), []
        source = model.llm if model.teacher is None else model.teacher
        for layer in source.model.layers:
            # Of a layer that keeps attention, teacher and student share it.
            if hasattr(layer.mixer, "attention") and model.teacher is None:
                layer.mixer.attention.register_forward_hook(lambda *_: calls.append("teacher"))
        for layer in model.llm.model.layers:
            if hasattr(layer.mixer, "mamba"):
                layer.mixer.mamba.register_forward_hook(lambda *_: calls.append("student"))
        saved = Saved()
        with saved.hooks:
            loss = model.compute_loss(**batch())["loss"]
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss.detach(), grads, saved.bytes, calls.count("teacher"), calls.count("student")))
    (loss, grads, kept, teacher_runs, student_runs), (again, same, less, runs, reruns) = found
    assert torch.equal(loss, again) and all(torch.equal(grads[name], same[name]) for name in grads)
    assert less < 0.7 * kept
    assert runs == teacher_runs and reruns == 2 * student_runs > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_activation_checkpointing_is_refused_where_it_would_do_nothing(teacher, stage):
    with pytest.raises(UserError, match="use_activation_checkpointing is for stage 3"):
        build(teacher, stage, use_activation_checkpointing=True)


@pytest.mark.parametrize("options", [STUDENTS[name] for name in ("linear", "hybrid", "windowed", "projections")])
def test_frozen_weights_exist_once(teacher, options):
    model, alone = build(teacher, 3, **options), load_teacher(teacher, dtype="float32")

    def stored(parameters):
        return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}.values())

    new = stored(p for p in model.parameters() if p.requires_grad)
    assert new > 0 and stored(model.parameters()) == stored(alone.parameters()) + new


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(backend="cuda"), "model.divergence.backend is 'cuda'"),
        (dict(backend="fla", direction="js"), "backend 'fla' has the forward direction"),
        (dict(backend="fla", temperature=2.0), "backend 'fla' has the forward direction"),
    ],
    ids=["unknown", "direction", "temperature"],
)
def test_a_divergence_backend_that_cannot_do_what_is_asked_is_refused(teacher, options, message):
    with pytest.raises(UserError, match=message):
        build(teacher, 3, divergence=options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("backend", ["liger", "fla"])
def test_a_divergence_backend_that_cannot_run_here_is_refused(teacher, backend):
    # Conversions and estimates build the model anywhere.
    model = build(teacher, 3, divergence=dict(backend=backend))
    with pytest.raises(UserError, match="is not installed|needs a CUDA device"):
        model.check_data(None)
