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
from .annotation import JsonlAnnotations
from .augment import jpeg_again
from .identity import describe_sources, fingerprint
from .ledger import Ledger, Skipped
from .masking import IGNORE_INDEX, encode_conversation, encode_text
from .meta import read_meta
from .template_fit import fit_template
from .video import FrameSampling, count_frames, read_frames

MIXINGS = ("repeat", "sqrt")
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
        max_length (int): Longest sample in tokens; a longer one is skipped, never cut.
        seed (int): Chooses which lines a fractional ``repeat_time`` keeps, which frames of a video are shown and
            how ``data_augment`` changes an image; the same for a line in every pass.
        max_bad_fraction (float, optional): Largest share of bad samples of any reason that are left out and noted. By
            default the first bad line is raised when the dataset is built, or when it is read where only its files are
            broken; samples that are too long are skipped in any case.
        frames (FrameSampling | dict, optional): How videos are shown, see
            :class:`~xtuner_ext.data.video.FrameSampling`.
        mixing (str): ``repeat`` takes datasets as often as their lengths times ``repeat_time`` say; ``sqrt`` lets
            samplers draw them by the square roots of these.

    Raises:
        UserError: For annotations that would be lost or misread in training, more bad lines than allowed, or a template
            that the tokenizer does not fit.

    Attributes:
        sources (list[tuple[MetaEntry, JsonlAnnotations]]): The meta file's datasets.
        index (ndarray): Source and line of every sample, (N, 2).
        fingerprints (list[str]): Of every source, see :func:`~xtuner_ext.data.identity.describe_sources`.
        bad (list[Skipped]): Lines that are left out because they were bad when the files were opened.
    """

    def __init__(
        self,
        meta,
        processor,
        template,
        max_length=8192,
        seed=0,
        max_bad_fraction=None,
        frames=None,
        mixing="repeat",
    ):
        if isinstance(processor, dict):
            from xtuner.registry import BUILDER

            processor = BUILDER.build(processor)
        if mixing not in MIXINGS:
            raise UserError(f"mixing is {mixing!r}, expected one of {', '.join(MIXINGS)}")
        self.processor = processor
        self.template = fit_template(template, processor.tokenizer)
        self.max_length, self.seed, self.mixing = max_length, seed, mixing
        self.max_bad_fraction, self.frames = max_bad_fraction, FrameSampling.of(frames)
        self.sources, index, ledger = [], [], Ledger(max_bad_fraction)
        for number, entry in enumerate(read_meta(meta)):
            annotations = self._open(entry, ledger)
            if entry.length not in (None, len(annotations)):
                message = f"{meta}: dataset {entry.name!r} has length {entry.length:,}, but {entry.annotation} has"
                print_log(f"{message} {len(annotations):,} lines", logger="current", level=logging.WARNING)
            self.sources.append((entry, annotations))
            lines = annotations.good[repeat_lines(len(annotations.good), entry.repeat_time, seed + number)]
            index.append(np.stack([np.full_like(lines, number), lines], axis=1))
        self.bad = ledger.entries
        if self.bad:
            print_log(f"bad lines are left out: {ledger.summary()}", logger="current", level=logging.WARNING)
        ledger.check(len(ledger) / self.line_count, f"{self.line_count:,} lines of {meta}")
        self.index = np.concatenate(index)
        if not len(self.index):
            reason = "its repeat_time is too small"
            if len(self.bad) == self.line_count:
                reason = f"every line is bad; the first is {self.bad[0].message}"
            raise UserError(f"meta file {meta} gives no sample, {reason}")
        self.fingerprints = [fingerprint(description) for description in describe_sources(self)]

    def _open(self, entry, ledger):
        def note(_, number, error):
            ledger.add([Skipped(entry.name, str(entry.annotation), number, error.reason, str(error))])

        on_bad = None if self.max_bad_fraction is None else note
        return JsonlAnnotations(entry.annotation, entry.root, on_bad, answered=True)

    def __len__(self):
        return len(self.index)

    @property
    def line_count(self):
        """int: Lines of all sources, bad ones included."""
        return sum(len(annotations) for _, annotations in self.sources)

    @property
    def mixture(self):
        """tuple[list[ndarray], ndarray] | None: Samples and weight of every group that samplers draw from."""
        if self.mixing == "repeat":
            return None
        groups = [np.flatnonzero(self.index[:, 0] == source) for source in range(len(self.sources))]
        groups = [group for group in groups if len(group)]
        return groups, np.sqrt([len(group) for group in groups])

    def record(self, index):
        """Record: The checked annotation behind a sample."""
        source, line = self.index[index]
        return self.sources[source][1][line]

    def __getitem__(self, index):
        return self._take(index)[0]

    def sample(self, index):
        """tuple[dict, Record]: A sample and the annotation behind it, the next ones' where it is bad."""
        sample, taken = self._take(index)
        return sample, self.record(taken)

    def _take(self, index):
        skipped, looked_at = [], []
        for step in range(len(self)):
            taken = (index + step) % len(self)
            sample, bad = self.attempt(taken)
            looked_at.append(tuple(self.index[taken].tolist()))
            if sample is not None:
                return {**sample, "looked_at": looked_at, "skipped": skipped}, taken
            skipped.append(bad)
        if all(bad.reason == "too_long" for bad in skipped):
            raise UserError(f"every sample is longer than max_length={self.max_length} tokens")
        raise UserError(f"every sample is bad; the first is {skipped[0].message}")

    def attempt(self, index):
        """Prepare a sample if it is good.

        Args:
            index (int): Below ``len(self)``.

        Returns:
            tuple[dict | None, Skipped | None]: What :meth:`encode` gives, or why there is none.

        Raises:
            BadSample: For a bad sample where none may be left out, unless it is only too long.
        """
        try:
            return self.encode(index), None
        except BadSample as error:
            if self.max_bad_fraction is None:
                if error.reason != "too_long":
                    raise
                print_log(f"{error}: skipped", logger="current", level=logging.WARNING)
            return None, self.skipped(*self.index[index], error)

    def skipped(self, source, line, error):
        """Skipped: The entry of the ledger for a line."""
        entry, annotations = self.sources[source]
        return Skipped(entry.name, str(annotations.path), annotations.number(line), error.reason, str(error))

    def encode(self, index):
        """Prepare a sample.

        Args:
            index (int): Below ``len(self)``.

        Returns:
            dict: ``input_ids`` and ``labels`` (L,), ``pixel_values`` (T, 3, S, S), ``keys`` with the
            fingerprint and the line that name this sample.

        Raises:
            BadSample: For a sample that cannot be read, has more than ``max_length`` tokens or, where such are left
                out, none that is trained.
        """
        record, (source, line) = self.record(index), self.index[index]
        limit = self._tile_limit(record, source)
        if record.video is not None:
            # Before anything is decoded, as videos are what is too long most of all.
            input_ids, labels = self._checked(record, [1] * self._count_frames(record, line))
            frames = read_frames(record.video, record.where, self.frames, record.clip, self._rng(line))
            tiles = self._tiles(frames, source, line, limit)
        else:
            images = (open_image(path, record.where) for path in record.images)
            tiles = self._tiles(images, source, line, limit)
            input_ids, labels = self._checked(record, [len(t) for t in tiles])
        size = self.processor.image_size
        # Of one image there is nothing to join, and tiles are most of a sample's bytes.
        pixels = tiles[0] if len(tiles) == 1 else torch.cat([torch.zeros(0, 3, size, size), *tiles])
        keys = [(self.fingerprints[source], int(line))]
        return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels, "keys": keys}

    def count_tokens(self, source, line):
        """Length of a sample, from the headers of its images or its video.

        Args:
            source (int): Index into ``sources``.
            line (int): Index into the source's annotations.

        Returns:
            int: L.

        Raises:
            BadSample: For a file that is missing or has no readable header.
        """
        record = self.sources[source][1][line]
        limit, tiles, slots = self._tile_limit(record, source), 0, len(record.images)
        for path in record.images:
            with _readable(path, record.where), Image.open(path) as image:
                tiles += self.processor.tile_count(image, limit)
        if record.video is not None:
            tiles = slots = self._count_frames(record, line)
        # Nothing merges with a visual token: one an image stands for all of them.
        tokens = len(self._encode(record, [1] * slots, 1)[0])
        return tokens + self.processor.tokens_per_tile * tiles - slots

    def _rng(self, line, *purpose):
        # Of seed and line alone, so that a sample is the same in every pass, process and resumed run.
        return np.random.default_rng([self.seed, line, *purpose])

    def _count_frames(self, record, line):
        return count_frames(record.video, record.where, self.frames, record.clip, self._rng(line))

    def _tiles(self, images, source, line, limit):
        if self.sources[source][0].augment:
            rng = self._rng(line, 1)
            images = (jpeg_again(image, rng) for image in images)
        return [self.processor.tiles(image, max_tiles=limit) for image in images]

    def _checked(self, record, tile_counts):
        input_ids, labels = self._tokens(record, tile_counts)
        if len(input_ids) > self.max_length:
            message = f"{record.where}: {len(input_ids)} tokens, more than max_length={self.max_length}"
            raise BadSample(message, "too_long")
        if self.max_bad_fraction is not None and not (labels[1:] != IGNORE_INDEX).any():
            message = f"{record.where}: none of its {len(labels)} tokens is trained, expected at least one"
            raise BadSample(message, "nothing_trained")
        return input_ids, labels

    def _tile_limit(self, record, source):
        if not (record.images or record.video is not None):
            return None
        if not self.processor.tokens_per_tile:
            found = "an image" if record.images else "a video"
            message = f"{record.where}: names {found}, but the model has no image front end"
            raise BadSample(message, "no_images_allowed")
        if record.video is not None:
            return 1
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
            turns = record.turns
            if record.video is not None:
                turns = [(self.frames.caption(question, len(tile_counts)), answer) for question, answer in turns]
            images = [self.processor.expand(IMAGE_PLACEHOLDER, [count], tokens_per_tile) for count in tile_counts]
            return encode_conversation(tokenizer, self.template, turns, record.system, record.ended, images)
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


def repeat_lines(count, repeat_time, seed):
    """ndarray: Indices below ``count``, each as often as ``repeat_time`` says; the seed chooses for a fraction."""
    whole = int(repeat_time)
    rest = round((repeat_time - whole) * count)
    chosen = np.random.default_rng(seed).permutation(count)[:rest]
    return np.concatenate([np.tile(np.arange(count), whole), np.sort(chosen)])
