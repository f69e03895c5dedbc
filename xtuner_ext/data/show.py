"""One sample of a meta JSON as the model sees it."""

import dataclasses
import itertools

import numpy as np
from PIL import ImageOps

from ..errors import UserError
from ..modeling.processing import tile_grid
from .dataset import ConversationDataset, open_image
from .masking import IGNORE_INDEX

FRAMES_A_ROW = 8


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens in a row that are all trained or all not, as text.

    Attributes:
        text (str): The text, or the image token.
        count (int): Tokens.
        trained (bool): Whether the model learns to say them.
        visual (bool): Whether they are an image token, again and again.
    """

    text: str
    count: int
    trained: bool
    visual: bool


def load_sample(meta, index, processor, template, frames=None):
    """Prepare a sample of any length.

    Args:
        meta (str): Path of the meta JSON.
        index (int): Number of the line, from 0, over the datasets in their order; blank lines do not count, and
            ``repeat_time`` does not matter.
        processor (HybridVLProcessor): Processor of the model.
        template (str): Name of the conversation template.
        frames (FrameSampling | dict, optional): How videos are shown.

    Returns:
        tuple[dict, Record, list]: The sample, its annotation, and the groups of its tiles for
        :func:`~xtuner_ext.data.sheet.contact_sheet`.

    Raises:
        UserError: For a bad sample, an index that no line has, or a mistake in the meta file.
    """
    dataset = ConversationDataset(meta, processor, template, 1 << 40, max_bad_fraction=1.0, frames=frames)
    counts = [len(annotations) for _, annotations in dataset.sources]
    if not 0 <= index < sum(counts):
        raise UserError(f"--index is {index}, but {meta} has {sum(counts):,} lines, expected 0 to {sum(counts) - 1}")
    source = int(np.searchsorted(np.cumsum(counts), index, side="right"))
    line = index - sum(counts[:source])
    name, number = dataset.sources[source][0].name, dataset.sources[source][1].number(line)
    for bad in dataset.bad:
        if (bad.dataset, bad.line) == (name, number):
            raise UserError(bad.message)
    # Also one that repeat_time would leave out.
    dataset.index = np.array([[source, line]])
    record, sample = dataset.record(0), dataset.encode(0)
    return sample, record, _groups(record, sample, processor, dataset.sources[source][0])


def _groups(record, sample, processor, entry):
    tiles = len(sample["pixel_values"])
    if record.video is not None:
        return [(tiles, FRAMES_A_ROW, False)]
    groups = []
    for path in record.images:
        columns = rows = 1
        if processor.fit == "tiles":
            size = ImageOps.exif_transpose(open_image(path, record.where)).size
            limit = processor.tile_limit(len(record.images), entry.max_dynamic_patch)
            columns, rows = tile_grid(*size, processor.image_size, processor.min_tiles, limit)
        thumbnail = processor.use_thumbnail and columns * rows > 1
        groups.append((columns * rows + thumbnail, columns, thumbnail))
    return groups


def spans(sample, processor):
    """Put a sample's tokens into words.

    Args:
        sample (dict): ``input_ids`` and ``labels`` (L,).
        processor (HybridVLProcessor): Its processor.

    Returns:
        list[Span]: In reading order.
    """
    tokenizer = processor.tokenizer
    context = tokenizer.convert_tokens_to_ids(processor.image_context) if processor.tokens_per_tile else None
    ids = sample["input_ids"].tolist()
    kinds = zip((label != IGNORE_INDEX for label in sample["labels"].tolist()), (token == context for token in ids))
    found, read, text = [], [], ""
    for (trained, visual), group in itertools.groupby(zip(kinds, ids), key=lambda pair: pair[0]):
        group = [token for _, token in group]
        # An image token stands for its run; decoded with what is before it, a text keeps the space it begins with.
        read += group[:1] if visual else group
        whole = tokenizer.decode(read, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = whole[len(text) :] if whole.startswith(text) else tokenizer.decode(group, skip_special_tokens=False)
        found.append(Span(processor.image_context if visual else piece, len(group), trained, visual))
        text = whole
    return found
