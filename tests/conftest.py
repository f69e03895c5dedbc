"""What all tests share."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from xtuner_ext import autoload  # noqa: E402

# Before any test imports torch or mmengine, also where the package is only on PYTHONPATH.
autoload.install()


@pytest.fixture(scope="session")
def repository():
    """Path of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def scripts():
    """Folder of the console scripts of the interpreter that runs the tests."""
    return Path(sys.executable).parent


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folder of a few digits samples; its ``tokenizer`` was trained on them."""
    from xtuner_ext.data.sources.digits_teacher import prepare_teacher

    out = tmp_path_factory.mktemp("data") / "digits"
    prepare_teacher(out, train=60, test=12)
    return out


@pytest.fixture(scope="session")
def digits_processor(digits):
    """Processor of the digits' tokenizer: tiles of 32 pixels, 4 tokens each, one an image."""
    from xtuner_ext.convert.processor import digits_processor

    return digits_processor(str(digits / "tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(digits):
    """Builds a random three-layer decoder in fp32; takes the word of ``layer_types`` per layer."""
    from xtuner_ext.convert.init import random_digits_teacher
    from xtuner_ext.modeling import HybridVLConfig, HybridVLForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, heads=4, kv_heads=2, embedding_layers=1, llm_layers=2)
    teacher = random_digits_teacher(str(digits / "tokenizer"), **sizes)

    def build(*layer_types):
        import torch

        layer_types = list(layer_types) or teacher.config.layer_types
        config = HybridVLConfig.from_dict({**teacher.config.to_dict(), "layer_types": layer_types})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return HybridVLForCausalLM(config).eval()

    return build


@pytest.fixture(scope="session")
def write_text_model():
    """Function that writes a small random Llama or Qwen2 and returns transformers' own model of it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    sizes = dict(
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

    def write(folder, family, **changes):
        config_class, model_class = classes[family]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config_class(**{**sizes, **changes})).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        return model

    return write
