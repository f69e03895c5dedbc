"""Conversations with images, and plain text, as training samples."""

import contextlib
import logging
import struct
import zlib

import numpy as np
import torch
from mmengine.logging import print_log
from PIL import Image
from torch.utils.data import Dataset

from ..errors import BadSample, UserError
from ..modeling.processing import IMAGE_PLACEHOLDER
from .annotation import JsonlAnnotations, read_meta
from .identity import describe_sources, fingerprint
from .masking import encode_conversation, encode_text
from .template_fit import fit_template


# What Pillow's many decoders raise for broken files.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


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

    Attributes:
        sources (list[tuple[MetaEntry, JsonlAnnotations]]): The meta file's datasets.
        index (ndarray): Source and line of every sample, (N, 2).
        fingerprints (list[str]): Of every source, see :func:`~xtuner_ext.data.identity.describe_sources`.
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
        self.index = np.concatenate(index)
        if not len(self.index):
            raise UserError(f"meta file {meta} gives no sample, its repeat_time is too small")
        self.fingerprints = [fingerprint(description) for description in describe_sources(self)]

    def __len__(self):
        return len(self.index)

    def record(self, index):
        """Record: The checked annotation behind a sample."""
        source, line = self.index[index]
        return self.sources[source][1][line]

    def __getitem__(self, index):
        return self.sample(index)[0]

    def sample(self, index):
        """tuple[dict, Record]: A sample and the annotation behind it, the next ones' where it is too long."""
        for attempt in range(len(self)):
            taken = (index + attempt) % len(self)
            sample = self.encode(taken)
            if sample is not None:
                return sample, self.record(taken)
        raise UserError(f"every sample is longer than max_length={self.max_length} tokens")

    def encode(self, index):
        """Prepare a sample.

        Args:
            index (int): Below ``len(self)``.

        Returns:
            dict | None: ``input_ids`` and ``labels`` (L,), ``pixel_values`` (T, 3, S, S), ``keys`` with the
            fingerprint and the line that name this sample; None, and a line in the log, for a sample longer than
            ``max_length``.
        """
        record, (source, line) = self.record(index), self.index[index]
        limit = self._tile_limit(record, source)
        tiles = [self.processor.tiles(open_image(path, record.where), max_tiles=limit) for path in record.images]
        input_ids, labels = self._tokens(record, [len(t) for t in tiles])
        if len(input_ids) > self.max_length:
            message = f"{record.where}: {len(input_ids)} tokens, more than max_length={self.max_length}: skipped"
            print_log(message, logger="current", level=logging.WARNING)
            return None
        size = self.processor.image_size
        # Of one image there is nothing to join, and tiles are most of a sample's bytes.
        pixels = tiles[0] if len(tiles) == 1 else torch.cat([torch.zeros(0, 3, size, size), *tiles])
        keys = [(self.fingerprints[source], int(line))]
        return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels, "keys": keys}

    def count_tokens(self, source, line):
        """Length of a sample, from the headers of its images.

        Args:
            source (int): Index into ``sources``.
            line (int): Index into the source's annotations.

        Returns:
            int: L.
        """
        record = self.sources[source][1][line]
        limit, tiles = self._tile_limit(record, source), 0
        for path in record.images:
            with _readable(path, record.where), Image.open(path) as image:
                tiles += self.processor.tile_count(image, limit)
        # Nothing merges with a visual token: one an image stands for all of them.
        tokens = len(self._encode(record, [1] * len(record.images), 1)[0])
        return tokens + self.processor.tokens_per_tile * tiles - len(record.images)

    def _tile_limit(self, record, source):
        if record.images and not self.processor.tokens_per_tile:
            raise BadSample(f"{record.where}: names an image, but the model has no image front end", "no_images_allowed")
        return self.processor.tile_limit(len(record.images), self.sources[source][0].max_dynamic_patch)

    def _tokens(self, record, tile_counts):
        if not tile_counts:
            return self._encode(record, [])
        # A tokenizer takes its time over thousands of visual tokens that are all the same.
        ids, labels = self._encode(record, [1] * len(tile_counts), 1)
        visual = ids == self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_context)
        repeats = torch.ones_like(ids)
        repeats[visual] = torch.tensor(tile_counts) * self.processor.tokens_per_tile
        return ids.repeat_interleave(repeats), labels.repeat_interleave(repeats)

    def _encode(self, record, tile_counts, tokens_per_tile=None):
        tokenizer = self.processor.tokenizer
        if record.text is None:
            images = [self.processor.expand(IMAGE_PLACEHOLDER, [count], tokens_per_tile) for count in tile_counts]
            return encode_conversation(tokenizer, self.template, record.turns, record.system, record.ended, images)
        if record.ended and tokenizer.eos_token_id is None:
            raise UserError(f"{record.where}: 'end' is true, but the tokenizer has no end-of-sequence token")
        return encode_text(tokenizer, record.text, record.ended)


def samples_config(config):
    """Find the dataset of single samples in a config.

    Args:
        config (dict): Of a dataset, perhaps one like ``PackedDataset`` that has another under ``dataset``.

    Returns:
        dict: The innermost dataset's config.
    """
    while "dataset" in config:
        config = config["dataset"]
    return config


def open_image(path, where):
    """Open an image file.

    Args:
        path (Path): File.
        where (str): ``file:line`` that names it.

    Returns:
        PIL.Image.Image: The decoded image.

    Raises:
        BadSample: When the file is missing or no image.
    """
    with _readable(path, where):
        image = Image.open(path)
        image.load()
    return image


@contextlib.contextmanager
def _readable(path, where):
    try:
        yield
    except FileNotFoundError as error:
        raise BadSample(f"{where}: image {path} does not exist", "missing_file") from error
    except UNREADABLE as error:
        raise BadSample(f"{where}: {path} is not a readable image: {error}", "unreadable_image") from error


def _repeat(count, repeat_time, seed):
    whole = int(repeat_time)
    rest = round((repeat_time - whole) * count)
    chosen = np.random.default_rng(seed).permutation(count)[:rest]
    return np.concatenate([np.tile(np.arange(count), whole), np.sort(chosen)])
