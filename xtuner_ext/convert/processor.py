"""Processors of models that have no folder yet."""

from transformers import AutoTokenizer

from ..modeling.processing import HybridVLProcessor


def digits_processor(tokenizer, image_size=32, tokens_per_tile=4):
    """The digits teacher's processor.

    Args:
        tokenizer (str): Folder of its tokenizer.
        image_size (int): Side of a tile in pixels.
        tokens_per_tile (int): Visual tokens of a tile.

    Returns:
        HybridVLProcessor: One tile an image.
    """
    return HybridVLProcessor(AutoTokenizer.from_pretrained(tokenizer), image_size, tokens_per_tile, max_tiles=1)
