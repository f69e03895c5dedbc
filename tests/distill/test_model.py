"""What trains in which stage, on what, and with which targets."""

import copy
import json

import pytest
import torch
from accelerate import init_empty_weights
from xtuner.registry import BUILDER

from tests.reference.hovle import hovle_config, hovle_logits, random_hovle_checkpoint
from xtuner_ext.convert import load_teacher
from xtuner_ext.distill import DistillModel
from xtuner_ext.distill.model import supervised_rows
from xtuner_ext.errors import UserError
from xtuner_ext.modeling import HybridCache

IMPROVED = dict(
    mixer=dict(qk_norm="l2", gate_bias=True), seeding=dict(A_log=0.0, dt_spacing="log", gate="open")
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hovle")
    config = hovle_config()
    return folder, config, random_hovle_checkpoint(folder, config, seed=3)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hovle_full")
    (folder / "config.json").write_text(json.dumps(hovle_config(full=True)))
    return folder


def build(folder, stage, **options):
    return DistillModel(llm=dict(type=load_teacher, pretrained_model_name_or_path=str(folder)), stage=stage, **options)


def batch(config, rows=2, length=24):
    generator = torch.Generator().manual_seed(0)
    image = config["embedding_config"]["img_context_token_id"]
    ids = torch.randint(3, image, (rows, length), generator=generator)
    ids[:, 2:6] = image
    labels = ids.clone()
    labels[:, :15] = -100
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, -4:] = 0
    labels[mask == 0] = -100
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return dict(input_ids=ids, labels=labels, attention_mask=mask, pixel_values=pixels)


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "stage, options, count",
    [
        (1, {}, 135_664_640),
        (2, {}, 404_100_096),
        # The paper's 404,099,072 and 303,074,304 leave out dt_bias and A_log, 16 numbers each a layer.
        (3, {}, 404_099_072 + 32 * 32),
        (3, {"attention_layers": [0, 4, 8, 12, 16, 20, 24, 28]}, 303_074_304 + 24 * 32),
    ],
    ids=["stage1", "stage2", "stage3-linear", "stage3-hybrid"],
)
def test_trainable_counts_at_full_size(full_size, stage, options, count):
    with init_empty_weights():
        assert trainable(build(full_size, stage, **options)) == count


def test_stage_one_feeds_every_layer_the_teachers_own_hidden_states(teacher):
    folder, config, state = teacher
    model = build(folder, 1)
    data = batch(config, rows=1)
    _, layer_inputs, head_outputs = hovle_logits(
        state, config, data["input_ids"], data["pixel_values"], return_hidden=True
    )
    seen, targets = [], []
    for layer in model.llm.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        attend = layer.mixer.attention.head_outputs
        layer.mixer.attention.head_outputs = lambda *a, attend=attend, **k: targets.append(attend(*a, **k)) or targets[-1]
    model.compute_loss(**data)
    assert len(seen) == len(layer_inputs)
    for ours, theirs in zip(seen, layer_inputs):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(targets, head_outputs):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_layers_alignment_depends_on_no_other_layers_mixer(teacher, stage):
    folder, config, _ = teacher
    model = build(folder, stage)
    before = model.compute_loss(**batch(config))
    with torch.no_grad():
        for parameter in model.llm.model.layers[1].mixer.mamba.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    after = model.compute_loss(**batch(config))
    changed = [key for key in before if key.startswith("align/layer_") and before[key] != after[key]]
    assert changed == ["align/layer_01"]


def test_a_layers_gradient_is_that_of_its_own_error(teacher):
    folder, config, _ = teacher
    model = build(folder, 2)
    data = batch(config)
    model.compute_loss(**data)["loss"].backward()
    layer, inputs = model.llm.model.layers[2], []
    layer.input_layernorm.register_forward_hook(lambda _, args, output: inputs.append(output))
    model.compute_loss(**data)
    context = layer.mixer_context(
        model.llm.model.layer_context(model.llm.embed(data["input_ids"], data["pixel_values"]), data["attention_mask"])
    )
    target = layer.mixer.attention.head_outputs(inputs[0], **context).detach()
    error = (layer.mixer.mamba.head_outputs(inputs[0], **context) - target).square().mean((-1, -2))
    mask = data["attention_mask"]
    loss = 1000 * (error * mask).sum() / mask.sum() / len(model.llm.model.layers)
    parameters = [p for p in layer.mixer.mamba.parameters() if p.requires_grad]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage, projections", [(1, False), (2, True), (3, True)])
def test_frozen_weights_get_no_gradient(teacher, stage, projections):
    folder, config, _ = teacher
    model = build(folder, stage)
    model.compute_loss(**batch(config))["loss"].backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(".q_proj." in name for name in touched) == projections
    assert not any(part in name for name in touched for part in ("o_proj", "mlp", "norm.weight", "embed")
                   if "g_norm" not in name)


def test_a_teacher_stays_the_teacher_while_its_student_trains(teacher):
    folder, config, state = teacher
    model = build(folder, 2)
    data = batch(config, rows=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.compute_loss(**data)["loss"].backward()
        optimizer.step()
    model._activate("full_attention")
    logits = model.llm(data["input_ids"], pixel_values=data["pixel_values"]).logits
    assert torch.allclose(logits, hovle_logits(state, config, data["input_ids"], data["pixel_values"]), atol=1e-4)


def test_loading_a_stage_two_checkpoint_leaves_the_teacher_alone(teacher, tmp_path):
    folder, config, state = teacher
    first = build(folder, 2)
    with torch.no_grad():
        for p in first.parameters():
            if p.requires_grad:
                p.add_(0.1)
    torch.save({"state_dict": first.state_dict(), "meta": {"distill": first.describe()}}, tmp_path / "two.pth")
    again = build(folder, 3, pretrained_pth=str(tmp_path / "two.pth"))
    for index, layer in enumerate(again.llm.model.layers):
        assert torch.equal(layer.mixer.mamba.q_proj.weight, first.llm.model.layers[index].mixer.mamba.q_proj.weight)
    data = batch(config, rows=1)
    again._activate("full_attention")
    logits = again.llm(data["input_ids"], pixel_values=data["pixel_values"]).logits
    assert torch.allclose(logits, hovle_logits(state, config, data["input_ids"], data["pixel_values"]), atol=1e-4)


def test_stage_three_with_one_copy_equals_stage_three_with_a_separate_teacher(teacher):
    folder, config, _ = teacher
    data = batch(config)
    shared, separate = (build(folder, 3, attention_layers=[0], trainable=scope, **IMPROVED) for scope in ("mixers", "all"))
    assert separate.teacher is not None and shared.teacher is None
    assert torch.isclose(shared.compute_loss(**data)["loss"], separate.compute_loss(**data)["loss"])


def test_tokens_decide_which_positions_are_matched(teacher):
    folder, config, _ = teacher
    data = batch(config)
    ids, labels, mask = (data[key] for key in ("input_ids", "labels", "attention_mask"))
    assert supervised_rows(ids, labels, mask, "answer").sum() == (labels[:, 1:] != -100).sum()
    assert supervised_rows(ids, labels, mask, "all").sum() == mask.sum()
    answer, everything = (build(folder, 3, divergence=dict(tokens=word)) for word in ("answer", "all"))
    assert answer.compute_loss(**data)["loss"] != everything.compute_loss(**data)["loss"]


def test_padding_changes_no_loss(teacher):
    folder, config, _ = teacher
    data = batch(config)
    data["attention_mask"][0, -4:] = 0
    data["labels"][0, -4:] = -100
    cut = {key: value[:, :-4] if key != "pixel_values" else value for key, value in data.items()}
    for stage in (1, 3):
        model = build(folder, stage)
        assert torch.isclose(model.compute_loss(**data)["loss"], model.compute_loss(**cut)["loss"], rtol=1e-5)


def test_the_log_gets_every_layer_and_the_image_text_split(teacher):
    folder, config, _ = teacher
    losses = build(folder, 1).compute_loss(**batch(config))
    layers = config["embedding_config"]["num_hidden_layers"] + config["llm_config"]["num_hidden_layers"]
    assert [f"align/layer_{i:02d}" in losses for i in range(layers)] == [True] * layers
    assert {"align/image", "align/text"} <= set(losses)


def test_checkpoints_hold_what_trains_and_decay_in_fp32(teacher):
    folder, _, _ = teacher
    model = DistillModel(
        llm=dict(type=load_teacher, pretrained_model_name_or_path=str(folder), dtype="bfloat16"), stage=1
    )
    state = model.state_dict()
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(tensor.dtype == torch.float32 for key, tensor in state.items() if key.endswith(("A_log", "dt_bias")))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stage=4), "model.stage is 4"),
        (dict(stage=3, attention_layers=[99]), "attention layer 99 is out of range"),
        (dict(stage=3, attention_layers=[-1]), "attention layer -1 is out of range"),
        (dict(stage=3, layer_types=["linear_attention", "mamba", "linear_attention", "linear_attention"]), "'mamba'"),
        (dict(stage=3, layer_types=["linear_attention"]), "names 1 layers, the model has 4"),
        (dict(stage=1, attention_layers=[0]), "belongs to stage 3"),
        (dict(stage=1, trainable="all"), "model.trainable"),
        (dict(stage=1, mixer=dict(kernel=2)), "unknown mixer key 'kernel'"),
        (dict(stage=1, seeding=dict(dt=2)), "unknown seeding key 'dt'"),
        (dict(stage=1, alignment=dict(weight=2)), "unknown key model.alignment.weight"),
        (dict(stage=3, divergence=dict(tokens="some")), "model.divergence.tokens is 'some'"),
        (dict(stage=2, trainable="projections"), "needs alignment.after_projection=True"),
        (dict(stage=3, attention_layers="gone.json"), "names gone.json, which does not exist"),
        (dict(stage=3, attention_layers=0), "attention_layers is 0, expected a list"),
        (dict(stage=3, attention_layers=["1"]), "attention layer '1' is out of range"),
        (dict(stage=3, divergence=dict(temperature=0)), "model.divergence.temperature is 0, expected more than 0"),
        (dict(stage=3, divergence=dict(chunk_rows=0)), "model.divergence.chunk_rows is 0, expected more than 0"),
        (dict(stage=1, trainable_dtype="fp32"), "model.trainable_dtype is 'fp32', expected 'float32'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradicting_settings_are_named(teacher, options, message):
    with pytest.raises(UserError, match=message):
        build(teacher[0], **options)


def test_a_teacher_folder_without_config_is_named(tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        build(tmp_path, 1)


def test_a_batch_of_text_alone_gives_every_trained_weight_a_gradient(teacher):
    folder, config, _ = teacher
    model = build(folder, 3, trainable="all", **IMPROVED).train()
    data = batch(config)
    data["input_ids"][:, 2:6] = 5
    data["pixel_values"] = torch.zeros(0, 3, 16, 16)
    model.compute_loss(**data)["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


WINDOWED = dict(mixer=dict(qk_norm="l2", use_rope=True, window=4, sink=True))


def test_measuring_between_steps_changes_no_alignment_of_packed_rows(teacher):
    """``final_states``, as the held-out hook calls it, leaves the masks of the next step as they were."""
    folder, config, _ = teacher
    model, data = build(folder, 1, **WINDOWED), batch(config)
    data["attention_mask"] = None
    data["segment_ids"] = torch.arange(24).div(8, rounding_mode="floor").expand(2, -1)
    before = model.compute_loss(**data)
    with torch.no_grad():
        model.final_states(**{key: value for key, value in data.items() if key != "labels"})
    after = model.compute_loss(**data)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_projections_train_q_k_v_and_o_and_leave_the_teachers_output_alone(teacher):
    folder, config, _ = teacher
    model = build(folder, 2, trainable="projections", alignment=dict(after_projection=True), **WINDOWED)
    kept = [copy.deepcopy(layer.mixer.attention.state_dict()) for layer in model.llm.model.layers]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.compute_loss(**batch(config))["loss"].backward()
        optimizer.step()
    for layer, state in zip(model.llm.model.layers, kept):
        mamba, attention = layer.mixer.mamba, layer.mixer.attention
        assert all(torch.equal(tensor, state[name]) for name, tensor in attention.state_dict().items())
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert not torch.equal(getattr(mamba, name).weight, getattr(attention, name).weight), name
    names = {key.partition(".mixer.mamba.")[2] for key in model.state_dict()}
    assert {"o_proj.weight", "sink_key", "sink_value", "share_proj.bias"} <= names and "" not in names
    assert "model.layers.0.mixer.o_proj.weight" in model.student_state()


@pytest.mark.parametrize("trainable", ["mixers", "projections"])
def test_alignment_after_the_projection_is_the_error_of_what_the_layer_adds(teacher, trainable):
    folder, config, state = teacher
    model = build(folder, 2, trainable=trainable, alignment=dict(scale=10.0, normalise=True, after_projection=True))
    data = batch(config)
    losses = model.compute_loss(**data)
    inputs = {"attention_mask": data["attention_mask"]}
    model._activate("full_attention")
    with torch.no_grad():
        embeds = model.llm.embed(data["input_ids"], data["pixel_values"])
        hidden = model.llm.model(inputs_embeds=embeds, output_hidden_states=True, **inputs).hidden_states
    context, real, errors = model.llm.model.layer_context(embeds, **inputs), data["attention_mask"].bool(), []
    for layer, before in zip(model.llm.model.layers, hidden):
        normed, own = layer.input_layernorm(before), layer.mixer_context(context)
        target = (layer.mixer.attention(normed, **own))[real]
        errors.append((layer.mixer.mamba(normed, **own)[real] - target).square().mean() / target.square().mean())
    torch.testing.assert_close(losses["loss"], 10 * torch.stack(errors).mean())
    losses["loss"].backward()
    last = {name: p for name, p in model.named_parameters() if p.requires_grad and f"layers.{len(errors) - 1}." in name}
    expected = torch.autograd.grad(10 * errors[-1] / len(errors), list(last.values()))
    for (name, parameter), gradient in zip(last.items(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_attention_layers_may_be_a_file_of_select_layers(teacher, tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"attention_layers": [1, 3], "order": [3, 1]}))
    model = build(teacher[0], 3, attention_layers=str(path))
    assert model.student_config.layer_types == ["linear_attention", "full_attention"] * 2


def test_sinks_start_as_the_teachers_keys_and_values_of_the_first_token(teacher):
    model, llm = build(teacher[0], 1, **WINDOWED), load_teacher(teacher[0])
    cache = HybridCache(llm.config)
    with torch.no_grad():
        llm(torch.tensor([[llm.config.bos_token_id, 9]]), past_key_values=cache)
    for layer, seen in zip(model.llm.model.layers, cache.layers):
        torch.testing.assert_close(layer.mixer.mamba.sink_key, seen.keys[0, :, 0])
        torch.testing.assert_close(layer.mixer.mamba.sink_value, seen.values[0, :, 0])


def test_a_sink_starts_without_a_first_token_where_the_teacher_has_none(write_text_model, tmp_path):
    write_text_model(tmp_path, "qwen2", bos_token_id=None)
    model = build(tmp_path, 1, **WINDOWED)
    assert model.student_config.bos_token_id is None
    assert all((layer.mixer.mamba.sink_key == 0).all() for layer in model.llm.model.layers)


@pytest.mark.parametrize("stage, rest", [(1, {}), (2, {}), (3, {}), (3, {"trainable": "all"})], ids=str)
def test_windowed_students_give_every_trained_weight_a_gradient(teacher, stage, rest):
    folder, config, _ = teacher
    model = build(folder, stage, **WINDOWED, **rest).train()
    model.compute_loss(**batch(config))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert {"sink_key", "sink_value"} <= trained


def test_decay_rates_stay_fp32_whatever_the_trainable_dtype(teacher):
    model = build(teacher[0], 1, trainable_dtype="bfloat16", mixer=dict(use_D=True))
    exact = {name for name, p in model.named_parameters() if name.endswith((".A_log", ".dt_bias", ".D"))}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == (torch.float32 if name in exact else torch.bfloat16), name


def test_a_hybrid_of_a_flash_attention_teacher_is_exported_on_a_cpu(small_project, tmp_path):
    from xtuner_ext.cli.config_options import load_config

    config = load_config(str(small_project / "stage3_linear.py"), ["model.attention_layers=[1]"])
    model = BUILDER.build(config.model)
    model.llm.config._attn_implementation = "flash_attention_2"
    model.to_hf(config, str(tmp_path / "out"), fp32=True)
    assert (tmp_path / "out" / "config.json").is_file()
