"""InternLM 1's folders, whose own code transformers 5 does not run."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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
        "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig", "AutoModelForCausalLM": "modeling_internlm.X"},
        "bias": True,
        "model_type": "internlm",
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
        "rotary": {"base": 10000, "type": "dynamic"},
        **sizes,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path, model


def test_it_is_a_llama_with_biases(folder):
    path, expected = folder
    # Its own code is not there, and must not be asked for.
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape == (1, 20)


def test_positions_scale_beyond_the_trained_length(folder):
    config = AutoConfig.from_pretrained(folder[0], trust_remote_code=True)
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 1.0}
    config = InternLMConfig(rotary={"base": 5000, "type": "origin"})
    assert config.rope_parameters == {"rope_theta": 5000.0, "rope_type": "default"}
