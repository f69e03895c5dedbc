"""Conversations with images, and plain text, as training samples."""

import logging

import numpy as np
import torch
from mmengine.logging import print_log
from PIL import Image
from torch.utils.data import Dataset

from ..errors import UserError
from .annotation import JsonlAnnotations, read_meta
from .masking import encode_conversation, encode_text
from .template_fit import fit_template


class ConversationDataset(Dataset):
    """Samples of every dataset that a meta JSON names.

    Args:
        meta (str): Path of the meta JSON.
        processor (HybridVLProcessor | dict): Processor, or the config that builds it.
        template (str): Conversation template.
        max_length (int): Longest sample in tokens; a longer one is skipped and named in the log.
        seed (int): Chooses which lines a fractional ``repeat_time`` keeps.

    Raises:
        UserError: For annotations that would be lost or misread in training, or a template that the
            tokenizer does not fit.
    """

    def __init__(self, meta, processor, template, max_length=8192, seed=0):
        if isinstance(processor, dict):
            from xtuner.registry import BUILDER

            processor = BUILDER.build(processor)
        self.processor = processor
        self.template = fit_template(template, processor.tokenizer)
        self.max_length = max_length
        self.sources, index = [], []
        for number, entry in enumerate(read_meta(meta)):
            annotations = JsonlAnnotations(entry.annotation, entry.root)
            self.sources.append((entry, annotations))
            lines = _repeat(len(annotations), entry.repeat_time, seed + number)
            index.append(np.stack([np.full_like(lines, number), lines], axis=1))
        self._index = np.concatenate(index)
        if not len(self._index):
            raise UserError(f"meta file {meta} gives no sample, its repeat_time is too small")

    def __len__(self):
        return len(self._index)

    def record(self, index):
        """Record: The checked annotation behind a sample."""
        source, line = self._index[index]
        return self.sources[source][1][line]

    def __getitem__(self, index):
        return self.sample(index)[0]

    def sample(self, index):
        """tuple[dict, Record]: A sample and the annotation behind it, the next ones' where it is too long."""
        for attempt in range(len(self)):
            taken = (index + attempt) % len(self)
            sample = self._encode(taken)
            if sample is not None:
                return sample, self.record(taken)
        raise UserError(f"every sample is longer than max_length={self.max_length} tokens")

    def _encode(self, index):
        entry = self.sources[self._index[index][0]][0]
        record = self.record(index)
        if record.images and not self.processor.tokens_per_tile:
            raise UserError(f"{record.where}: names an image, but the model has no image front end")
        limit = self.processor.tile_limit(len(record.images), entry.max_dynamic_patch)
        tiles = [self.processor.tiles(open_image(path, record.where), max_tiles=limit) for path in record.images]
        counts, turns = iter([len(t) for t in tiles]), []
        for question, answer in record.turns:
            here = [next(counts) for _ in range(question.count("<image>"))]
            turns.append((self.processor.expand(question, here), answer))
        tokenizer = self.processor.tokenizer
        if record.text is None:
            input_ids, labels = encode_conversation(tokenizer, self.template, turns, record.system, record.ended)
        elif record.ended and tokenizer.eos_token_id is None:
            raise UserError(f"{record.where}: 'end' is true, but the tokenizer has no end-of-sequence token")
        else:
            input_ids, labels = encode_text(tokenizer, record.text, record.ended)
        if len(input_ids) > self.max_length:
            message = f"{record.where}: {len(input_ids)} tokens, more than max_length={self.max_length}: skipped"
            print_log(message, logger="current", level=logging.WARNING)
            return None
        size = self.processor.image_size
        pixels = torch.cat(tiles) if tiles else torch.zeros(0, 3, size, size)
        return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels}


def open_image(path, where):
    """Open an image file.

    Args:
        path (Path): File.
        where (str): ``file:line`` that names it.

    Returns:
        PIL.Image.Image: The decoded image.

    Raises:
        UserError: When the file is missing or no image.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise UserError(f"{where}: image {path} does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: {path} is not a readable image: {error}") from error
    return image


def _repeat(count, repeat_time, seed):
    whole = int(repeat_time)
    rest = round((repeat_time - whole) * count)
    chosen = np.random.default_rng(seed).permutation(count)[:rest]
    return np.concatenate([np.tile(np.arange(count), whole), np.sort(chosen)])
