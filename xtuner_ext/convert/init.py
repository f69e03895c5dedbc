"""Fresh random decoders, for training a small teacher from nothing."""

import torch
from transformers import AutoTokenizer

from ..data.sources.digits_teacher import teacher_config
from ..modeling import HybridVLForCausalLM
from . import hovle


def random_digits_teacher(tokenizer, seed=0, **sizes):
    """A HoVLE-shaped decoder with random weights.

    Args:
        tokenizer (str): Folder of its tokenizer.
        seed (int): Seed of the weights.
        **sizes: Arguments of :func:`teacher_config` after the tokenizer.

    Returns:
        HybridVLForCausalLM: In fp32.
    """
    raw = teacher_config(AutoTokenizer.from_pretrained(tokenizer), **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = hovle.model_config(raw)
        # The usual 0.02 suits wide models; at this width it hides the picture behind the text.
        config.initializer_range = config.hidden_size**-0.5
        return HybridVLForCausalLM(config)
