"""Greedy choice of attention layers against divergences of whole models."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests.reference.hovle import hovle_config, random_hovle_checkpoint
from xtuner_ext.convert import load_teacher
from xtuner_ext.distill import DistillModel
from xtuner_ext.distill.layer_selection import LayerProbe, evenly_spaced, probe_count, read_selection, select_layers
from xtuner_ext.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hovle")
    random_hovle_checkpoint(folder, hovle_config(), seed=3)
    return DistillModel(llm=dict(type=load_teacher, pretrained_model_name_or_path=str(folder)), stage=2)


@pytest.fixture(scope="module")
def batches(model):
    config, found = model.llm.config, []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, config.image_token_id, (2, 20), generator=generator)
        ids[:, 2:6] = config.image_token_id
        labels = ids.clone()
        labels[:, :12] = -100
        mask = torch.ones_like(ids)
        mask[1, -3:], labels[1, -3:] = 0, -100
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        found.append(dict(input_ids=ids, labels=labels, attention_mask=mask, pixel_values=pixels))
    return found


@pytest.fixture(scope="module")
def probe(model, batches):
    return LayerProbe(model, batches)


def whole_divergence(model, batches, attention_layers):
    """KL per token of the student assembled the ordinary way."""
    count, total, tokens = len(model.llm.model.layers), 0.0, 0
    for batch in batches:
        logits = {}
        for name, layers in (("teacher", range(count)), ("student", attention_layers)):
            words = ["full_attention" if i in set(layers) else "linear_attention" for i in range(count)]
            for layer, word in zip(model.llm.model.layers, words):
                layer.mixer.active = word
            model.llm.config.layer_types = words
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            with torch.no_grad():
                logits[name] = model.llm(**inputs, use_cache=False).logits
        rows = batch["labels"][:, 1:] != -100
        ours, theirs = (logits[n][:, :-1][rows].log_softmax(-1) for n in ("student", "teacher"))
        total += F.kl_div(ours, theirs, log_target=True, reduction="sum").item()
        tokens += int(rows.sum())
    return total / tokens


@pytest.mark.parametrize("layers", [[], [0], [2], [0, 1]], ids=str)
def test_divergence_is_that_of_the_assembled_student(model, batches, probe, layers):
    assert probe.divergence(layers) == pytest.approx(whole_divergence(model, batches, layers), rel=1e-4)


def test_attention_everywhere_diverges_nowhere(model, probe):
    assert abs(probe.divergence(list(range(len(model.llm.model.layers))))) < 1e-6


def test_additions_equal_measuring_every_placement_from_the_first_layer_on(model, probe):
    found = probe.additions([1])
    assert set(found) == set(range(len(model.llm.model.layers))) - {1}
    for layer, value in found.items():
        assert value == pytest.approx(probe.divergence([1, layer]), rel=1e-4)


def test_every_choice_is_the_best_addition(model, probe):
    count, probes = len(model.llm.model.layers), []
    result = select_layers(probe, 2, on_probe=lambda: probes.append(1))
    assert len(probes) == probe_count(2, count) == count + count - 1
    first = min(result["ranking"], key=result["ranking"].get)
    assert result["order"][0] == first
    assert result["order"][1] == min((v, k) for k, v in probe.additions([first]).items())[1]
    assert result["attention_layers"] == sorted(result["order"])
    assert result["placements"]["selected"]["kl"] == result["greedy"][-1]
    assert result["placements"]["first"]["layers"] == [0, 1]
    assert result["placements"]["last"]["layers"] == [count - 2, count - 1]


def test_evenly_spaced_is_every_fourth_for_a_quarter():
    assert evenly_spaced(8, 32) == list(range(0, 32, 4))
    assert evenly_spaced(2, 8) == [0, 4]


def test_a_selection_is_read_by_the_stage_that_needs_it(model, tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"attention_layers": [1]}))
    assert read_selection(str(path)) == [1]


@pytest.mark.parametrize("text", [None, "[1]", "{}", "not json"], ids=["missing", "a list", "empty", "text"])
def test_another_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "layers.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="layers.json"):
        read_selection(str(path))
