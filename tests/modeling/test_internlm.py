"""InternLM 1's folders, whose own code transformers 5 does not run."""

import json

import pytest
import sentencepiece
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from xtuner_ext.modeling import InternLMConfig


@pytest.fixture
def folder(tmp_path):
    """A folder as the authors publish it, with the weights of a Llama that has biases."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, max_position_embeddings=16)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    raw = {
        "architectures": ["InternLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_internlm.X", "AutoModelForCausalLM": "modeling_internlm.X"},
        "bias": True,
        "model_type": "internlm",
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
        "rotary": {"base": 10000, "type": "dynamic"},
        **sizes,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path, model


@pytest.mark.parametrize("trust", [False, True])
def test_it_is_a_llama_with_biases(folder, trust):
    path, expected = folder
    # Its own code is not there, and must not be asked for.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=trust).eval()
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape == (1, 20)


def test_positions_scale_beyond_the_trained_length(folder):
    config = AutoConfig.from_pretrained(folder[0])
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 1.0}
    config = InternLMConfig(rotary={"base": 5000, "type": "origin"})
    assert config.rope_parameters == {"rope_theta": 5000.0, "rope_type": "default"}


@pytest.fixture
def words(folder):
    """The folder with a tokenizer as the authors publish it, and SentencePiece itself."""
    path = folder[0]
    lines = ["What is in the picture? A black horse.", "你好，请描述一下这张照片。", "Say hello, 12 of 345 times!"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path / "tokenizer"),
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<eoh>", "<eoa>"],
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    # The code that is named must not be asked for.
    code = {"auto_map": {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]}}
    raw = {**special, **code, "tokenizer_class": "InternLMTokenizer", "clean_up_tokenization_spaces": False}
    (path / "tokenizer_config.json").write_text(json.dumps(raw))
    return path, sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model"))


@pytest.mark.parametrize("trust", [False, True])
def test_words_are_sentencepieces(words, trust, tmp_path):
    path, expected = words
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    for text in ("<|User|>:What is in the picture?<eoh>\n<|Bot|>:", "你好 é 🐎", " two  spaces\n\tof １２", "", "<eoh> a"):
        ids = tokenizer(text).input_ids
        assert ids == [1, *expected.encode(text)] == again(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text == again.decode(ids[1:])
        assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode([1, *expected.encode("a horse"), 2]) == "<s>a horse</s>"
    # A row of the model behind the last piece.
    assert tokenizer.decode([len(tokenizer) + 3]) == "<unk>"
