"""Lengths of samples in tokens, counted once; of images only the headers are read."""

import io
import logging
from pathlib import Path

import numpy as np
import transformers
from mmengine.dist import all_gather_object, broadcast_object_list, get_dist_info
from mmengine.logging import print_log

from ..compat import replace_file
from ..errors import BadSample, UserError
from .identity import describe_sources, fingerprint

UNKNOWN = -1


def sample_lengths(dataset, cache_dir=None):
    """Count the tokens of every sample.

    The processes of a distributed run share the work, so all of them must call this together.

    Args:
        dataset (ConversationDataset): N samples.
        cache_dir (str, optional): Folder that keeps the counts, one file an annotation file, named after all that
            they depend on except the images: annotations, tokenizer, template and tiling. By default they are
            counted again by every run.

    Returns:
        ndarray: (N,), int64; ``UNKNOWN`` for a sample that cannot be read, where the dataset leaves such out.

    Raises:
        UserError: For a dataset of another kind, a sample that cannot be read and may not be left out, or a folder
            that cannot be written.
    """
    if not hasattr(dataset, "count_tokens"):
        found = type(dataset).__name__
        raise UserError(f"{found} does not tell the lengths of its samples, expected a ConversationDataset")
    lengths = np.empty(len(dataset), dtype=np.int64)
    for source in range(len(dataset.sources)):
        mine = dataset.index[:, 0] == source
        lines = dataset.index[mine, 1]
        lengths[mine] = _line_lengths(dataset, source, np.unique(lines), cache_dir)[lines]
    return lengths


def _line_lengths(dataset, source, wanted, cache_dir):
    """Tokens by line, ``UNKNOWN`` where a line is not wanted and was never counted."""
    annotations = dataset.sources[source][1]
    rank, processes = get_dist_info()
    path, known = None, [None]
    if rank == 0:
        if cache_dir is not None:
            # The images lie in the root, and another version of transformers may count other tokens.
            images = {"root": str(dataset.sources[source][0].root.resolve()), "transformers": transformers.__version__}
            path = Path(cache_dir) / f"{fingerprint({**describe_sources(dataset)[source], **images})}.npy"
        known = [_read(path, len(annotations))]
    # Only the first process looks: another might see a file that the first one has just written.
    broadcast_object_list(known)
    lengths = known[0]
    missing = wanted[lengths[wanted] == UNKNOWN]
    if len(missing):
        print_log(f"counting the tokens of {len(missing):,} samples of {annotations.path}", logger="current")
        share = np.array([_count(dataset, source, int(line)) for line in missing[rank::processes]], dtype=np.int64)
        for other, counts in enumerate(all_gather_object(share)):
            lengths[missing[other::processes]] = counts
        if path is not None:
            _write(path, lengths)
    return lengths


def _count(dataset, source, line):
    try:
        return dataset.count_tokens(source, line)
    except BadSample:
        if dataset.max_bad_fraction is None:
            raise
        return UNKNOWN


def _read(path, count):
    if path is not None and path.is_file():
        try:
            lengths = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            print_log(f"{path} is no file of lengths, counting again: {error}", logger="current", level=logging.WARNING)
        else:
            if lengths.shape == (count,) and lengths.dtype == np.int64:
                return lengths
    return np.full(count, UNKNOWN, dtype=np.int64)


def _write(path, lengths):
    content = io.BytesIO()
    np.save(content, lengths)
    try:
        replace_file(path, content.getvalue())
    except OSError as error:
        raise UserError(f"cache_dir {path.parent} cannot be written: {error}") from error
