"""Writing the digits teacher in HoVLE's own layout."""

import json

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from ..data.sources.digits_teacher import teacher_config
from . import hovle
from .checkpoint import whole_folder


def write_digits_teacher(model, tokenizer, out, dtype="bfloat16"):
    """Write an all-attention decoder as a HoVLE checkpoint.

    Args:
        model (HybridVLForCausalLM): The decoder.
        tokenizer (str): Folder of its tokenizer.
        out (str): Folder to write.
        dtype (str): Of the stored weights.
    """
    config = model.config
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    raw = teacher_config(
        tokenizer,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        embedding_layers=config.num_embedding_layers,
        llm_layers=config.num_hidden_layers - config.num_embedding_layers,
    )
    state = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    state.update({key: torch.zeros(shape) for key, shape in hovle.unread_shapes(config).items()})
    state = hovle.to_checkpoint(config, state)
    state = {key: tensor.to(getattr(torch, dtype)).contiguous().clone() for key, tensor in state.items()}
    with whole_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps({**raw, "torch_dtype": dtype}, indent=2))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
