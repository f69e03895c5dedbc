"""Folders that no map can translate end with one sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file

from xtuner_ext.cli.main import run
from xtuner_ext.convert import internlm2, llama, load_teacher, qwen2
from xtuner_ext.convert.teacher import load_processor, teacher_family
from xtuner_ext.errors import UserError

LLAMA, QWEN2 = {"model_type": "llama"}, {"model_type": "qwen2"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_local_experts is 8: mixture-of-experts"),
        ({"model_type": "qwen2_moe", "num_experts": 60}, "num_experts is 60: mixture-of-experts"),
        ({"model_type": "deepseek_v2", "n_routed_experts": 64}, "n_routed_experts is 64: mixture-of-experts"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window is 4096: sliding-window attention"),
        ({**LLAMA, "sliding_window": 512}, "sliding_window is 512"),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 1024}, "sliding_window is 1024"),
        ({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]}, r"layer_types\[1\] is 'sliding_attention'"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "method 'gptq': packed weights"),
        ({**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}}, "method 'bitsandbytes'"),
        ({**LLAMA, "attention_bias": True}, "attention_bias is true: a bias of the output projection"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({**LLAMA, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "factor is 0.25"),
        ({**LLAMA, "alibi": True}, "ALiBi positions"),
        ({**LLAMA, "rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]}},
         "rotary scaling 'longrope' is not supported"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "is no llama configuration: .*factor"),
        ({**LLAMA, "rope_scaling": "linear"}, "is no llama configuration"),
        ({**LLAMA, "hidden_size": "wide"}, "is no llama configuration: .*hidden_size"),
        ({**LLAMA, "hidden_act": "sigluu"}, "hidden_act is 'sigluu'"),
        ({"model_type": "internlm2", "bias": True}, "bias is not false"),
        ({"model_type": "internlm2", "bias": False, "rope_scaling": {"type": "su"}}, "rotary scaling 'su'"),
        ({"model_type": "gpt2"}, "model_type 'gpt2', which is none of: HoVLE, InternVL2, LLaVA, InternLM2, Llama, Qwen2"),
    ],
)
def test_unsupported_architectures_are_named(tmp_path, raw, message, capsys):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message) as error:
        load_teacher(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(error.value)
    assert run(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"xtuner-ext: error: {error.value}\n"


@pytest.mark.parametrize(
    "raw",
    [
        {**QWEN2, "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
        {**QWEN2, "sliding_window": 32768},
        {**LLAMA, "sliding_window": None, "num_experts": 0},
        {**LLAMA, "partial_rotary_factor": 1.0, "attention_bias": False},
        {"model_type": "internlm2", "bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
)
def test_keys_that_say_nothing_unusual_are_fine(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    family = teacher_family(tmp_path)
    assert family in (llama, qwen2, internlm2)
    assert set(family.model_config(raw).layer_types) == {"full_attention"}


INTERNVL2 = {"model_type": "internvl_chat", "llm_config": {}, "vision_config": {}}


@pytest.mark.parametrize(
    "raw",
    [
        [],
        {"model_type": "internlm2", "bias": False, "hidden_size": "2048"},
        {"model_type": "internlm2", "bias": False, "num_attention_heads": None},
        {"model_type": "internlm2", "bias": False, "rope_scaling": "dynamic"},
        {**INTERNVL2, "vision_config": "large"},
        {"model_type": "internvl_chat", "embedding_config": {}, "llm_config": None},
        {"model_type": "llava", "text_config": {}, "vision_config": {"hidden_size": "wide"}},
        {"model_type": "hybrid_vl", "hidden_size": "wide"},
    ],
)
def test_fields_of_the_wrong_kind_end_in_one_sentence(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        load_teacher(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(error.value)


def test_only_a_gguf_file_names_the_verb(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"")
    command = f"unpack it first: xtuner-ext convert gguf_to_hf {tmp_path / 'model.gguf'} DIR"
    for argument in (tmp_path, tmp_path / "model.gguf"):
        assert run(["inspect", str(argument)]) == 2
        assert command in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(UserError, match="holds only a GGUF file"):
        load_teacher(tmp_path)


def as_pickle(folder, shards=1):
    """Turn a folder's safetensors into the files that torch writes."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {key: f"pytorch_model-{number % shards}.bin" for number, key in enumerate(state)}
    for name in set(weight_map.values()):
        torch.save({key: tensor for key, tensor in state.items() if weight_map[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_load(tmp_path, write_text_model, left_padded, shards):
    theirs = write_text_model(tmp_path, "llama")
    as_pickle(tmp_path, shards)
    with torch.no_grad():
        torch.testing.assert_close(load_teacher(tmp_path)(left_padded[0]).logits, theirs(left_padded[0]).logits)
    assert run(["inspect", str(tmp_path), "--json"]) == 0


def test_pickles_that_hold_code_or_nothing_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": print}, path)
    with pytest.raises(UserError, match=f"{path} is not a readable file of weights"):
        load_teacher(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a readable file of weights"):
        load_teacher(tmp_path)
    torch.save({"step": 3}, path)
    with pytest.raises(UserError, match="holds more than named tensors"):
        load_teacher(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="has neither model.safetensors"):
        load_teacher(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, write_text_model, digits_processor, capsys):
    write_text_model(tmp_path, "llama", vocab_size=100)
    digits_processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the model's vocabulary has 100 tokens") as error:
        load_processor(tmp_path)
    assert f"the id {len(digits_processor.tokenizer) - 1}" in str(error.value)
    assert run(["inspect", str(tmp_path)]) == 2 and str(error.value) in capsys.readouterr().err
