"""The verb `inspect`: numbers from headers, without weights."""

import json

import pytest
import torch

from xtuner_ext.cli.main import run
from xtuner_ext.convert import load_teacher
from xtuner_ext.distill import DistillModel
from xtuner_ext.modeling import HybridCache, HybridVLConfig, HybridVLForCausalLM


@pytest.fixture
def folder(tmp_path, write_text_model, digits_processor):
    """A tied Qwen2 of three layers with the digits' tokenizer, and transformers' model of it."""
    # A few ids more than the tokenizer uses, as published models have.
    model = write_text_model(tmp_path / "qwen", "qwen2", tie_word_embeddings=True, vocab_size=400)
    digits_processor.tokenizer.save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen", model


def report(capsys, *argv):
    assert run(["inspect", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_teacher_and_its_students(folder, capsys):
    path, model = folder
    found = report(capsys, path)
    assert (found["family"], found["layers"], found["attention_layers"]) == ("Qwen2", 3, [0, 1, 2])
    assert (found["attention_heads"], found["kv_heads"], found["head_width"], found["hidden_size"]) == (4, 2, 8, 32)
    assert (found["vocabulary"], found["context_length"]) == (model.config.vocab_size, 64)
    assert (found["template"], found["template_remark"], found["image_front_end"]) == ("internlm2_chat", None, None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert found["stored_parameters"] == parameters and found["weight_dtypes"] == {"float32": parameters}
    # Keys and values, 2 heads of width 8, in 2 bytes, in 3 layers.
    assert found["cache_bytes_per_token"] == 3 * 2 * 2 * 8 * 2
    teacher, linear, hybrid = found["models"]
    assert teacher["parameters"] == parameters
    assert teacher["cache_bytes"] == {str(n): n * 192 for n in (1024, 16384, 65536, 131072)}
    assert linear["attention_layers"] == [] and len(set(linear["cache_bytes"].values())) == 1
    assert hybrid["attention_layers"] == [0] and teacher["parameters"] < hybrid["parameters"] < linear["parameters"]


def test_promised_students_are_those_that_are_built(folder, capsys):
    path, _ = folder
    linear, hybrid = report(capsys, path)["models"][1:]
    for promised in (linear, hybrid):
        llm = dict(type=load_teacher, pretrained_model_name_or_path=str(path))
        config = DistillModel(llm=llm, stage=3, attention_layers=promised["attention_layers"]).student_config
        student = HybridVLForCausalLM(config)
        assert sum(parameter.numel() for parameter in student.parameters()) == promised["parameters"]
        assert {str(n): config.cache_bytes(n) for n in (1024, 16384, 65536, 131072)} == promised["cache_bytes"]


def test_an_exported_student(tiny_model, digits_processor, tmp_path, capsys):
    model = tiny_model("linear_attention", "full_attention", "linear_attention")
    model.save_pretrained(tmp_path)
    digits_processor.save_pretrained(tmp_path)
    found = report(capsys, tmp_path)
    assert (found["family"], found["attention_layers"], found["image_front_end"]) == ("exported student", [1], "patch")
    student, teacher = found["models"]
    assert student["attention_layers"] == [1] and teacher["attention_layers"] == [0, 1, 2]
    assert student["parameters"] == found["stored_parameters"] == sum(p.numel() for p in model.parameters())


LINEAR, ATTENTION = "linear_attention", "full_attention"
STUDENTS = {
    "windowed": ([LINEAR] * 3, dict(window=4, sink=True)),
    "windowed hybrid": ([LINEAR, ATTENTION, LINEAR], dict(window=64, sink=True, conv_kernel=4)),
    "hybrid": ([ATTENTION, LINEAR, LINEAR], dict(conv_kernel=0, use_D=True)),
    "linear": ([LINEAR] * 3, {}),
}


@pytest.mark.parametrize("layer_types, mixer", STUDENTS.values(), ids=STUDENTS)
@pytest.mark.parametrize("prompt", [1020, 3], ids=["long prompt", "short prompt"])
def test_cache_numbers_are_those_of_a_cache_after_generating(
    tiny_model, digits_processor, tmp_path, capsys, layer_types, mixer, prompt
):
    config = HybridVLConfig.from_dict({**tiny_model().config.to_dict(), "layer_types": layer_types, "mixer": mixer})
    HybridVLForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    digits_processor.save_pretrained(tmp_path)
    found = report(capsys, tmp_path)
    student = HybridVLForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    everywhere = HybridVLForCausalLM(HybridVLConfig.from_dict({**config.to_dict(), "layer_types": [ATTENTION] * 3}))
    for promised, model in zip(found["models"], (student, everywhere.to(torch.bfloat16).eval())):
        cache = HybridCache(model.config)
        # The last token that is generated is not read.
        model.generate(
            torch.full((1, prompt), 9), max_new_tokens=5, min_new_tokens=5, do_sample=False, past_key_values=cache
        )
        seen = prompt + 4
        assert cache.get_seq_length() == seen and cache.nbytes() == model.config.cache_bytes(seen)
        # The tensors are not parts of larger ones.
        tensors = [tensor for layer in cache.layers for tensor in _tensors(layer)]
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == cache.nbytes()
        if seen == 1024:
            assert promised["cache_bytes"]["1024"] == cache.nbytes()
    per_token = layer_types.count(ATTENTION) * 2 * 2 * 8 * 2
    assert found["cache_bytes_per_token"] == per_token
    one, other = (found["models"][0]["cache_bytes"][str(length)] for length in (1024, 65536))
    assert other - one == per_token * (65536 - 1024)


def _tensors(layer):
    if hasattr(layer, "recurrent_states"):
        states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        return [state for state in states if state is not None]
    return [layer.keys, layer.values]


def test_tables_and_folders_without_tokenizer(folder, capsys):
    path, _ = folder
    assert run(["inspect", str(path)]) == 0
    output = capsys.readouterr().out
    assert "internlm2_chat" in output and "hybrid student 1:3" in output and "128K" in output
    for file in path.glob("tokenizer*"):
        file.unlink()
    found = report(capsys, path)
    assert found["template"] is None and "has no tokenizer that loads" in found["template_remark"]


def test_missing_weights_are_found_without_reading_any(folder, capsys):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4, "layer_types": None}))
    assert run(["inspect", str(path)]) == 2
    assert "12 tensors are missing, the first is model.layers.3." in capsys.readouterr().err
