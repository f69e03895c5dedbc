"""Checkpoints of text families, written by transformers itself."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from xtuner_ext.modeling import HybridVLForCausalLM

CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    # Large enough that a mistake anywhere shows.
    initializer_range=0.3,
)


@pytest.fixture(scope="session")
def write_text_model():
    """Function that writes a random text model of a family and returns transformers' own model of it."""

    def write(folder, family, **changes):
        config_class, model_class = CLASSES[family]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config_class(**{**SIZES, **changes})).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        return model

    return write


@pytest.fixture
def left_padded():
    """Token ids (2, 13) and their mask; the second row starts with five paddings."""
    ids = torch.randint(1, SIZES["vocab_size"], (2, 13), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


@pytest.fixture
def is_tied():
    """Function that tells whether a model's head and embedding are one parameter."""

    def check(model: HybridVLForCausalLM):
        return model.lm_head.weight is model.model.embed_tokens.weight

    return check
