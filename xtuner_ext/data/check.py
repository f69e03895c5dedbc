"""Checks of a meta JSON's datasets before training: what would be lost, and how long samples are."""

import contextlib
import gc
import multiprocessing
import os
import signal
from collections import Counter, deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image

from ..errors import BadSample, UserError
from ..modeling.processing import IMAGE_PLACEHOLDER
from .annotation import MediaFiles, check_line
from .counting import TokenCounter
from .dataset import UNREADABLE, repeat_lines
from .meta import read_meta
from .packing import first_fit_decreasing
from .video import FRAME_SUFFIXES, FrameSampling, count_frames

# How files of these formats end; some programs write a few bytes more.
ENDS, TAIL = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}, 64
KINDS = ("text", "image", "images", "video")
PIECE = 1 << 20  # bytes of lines that a process checks at a time
KEPT = 50_000  # images whose tiles are remembered
# Bad lines of a dataset that are named, all others are counted: where every line is bad, one of them says why.
NAMED = 100_000
# For the estimate of padding: samples of a batch, and samples that are looked at.
BATCH, SAMPLED = 8, 100_000


def check_meta(
    meta, processor=None, template=None, max_length=8192, frames=None, images=True, jobs=None, seed=0, progress=None
):
    """Look at every line that a meta JSON names as training would, without decoding what it names.

    Of images the headers and the ends of the files are read, of videos the headers; an image is decoded only where its
    file's end does not tell that it is whole.

    Args:
        meta (str): Path of the meta JSON.
        processor (HybridVLProcessor, optional): Processor of the model; without it tokens and tiles are not counted.
        template (Template, optional): From :func:`~xtuner_ext.data.template_fit.fit_template`; with a processor.
        max_length (int): Longest sample in tokens.
        frames (FrameSampling | dict, optional): How videos are shown.
        images (bool): Read the headers of images and videos. Without them an image counts as one tile, a video as
            the fewest frames that it may have.
        jobs (int, optional): Processes; by default one for every processor.
        seed (int): The dataset's, which decides how many frames a video shows.
        progress (callable, optional): Takes a name and a total of KiB and gives a context with a callable that is told
            of those just done, see :func:`~xtuner_ext.cli.progress.progress`.

    Returns:
        dict: ``datasets``, each with counts, lengths and bad lines (up to :data:`NAMED`), their ``total``, and how full
        ``batches`` would be; as JSON can hold it.

    Raises:
        UserError: For a mistake in the meta file itself, or a process that was killed.
    """
    entries = read_meta(meta)
    checker = _Checker(entries, processor, template, max_length, FrameSampling.of(frames), images, seed)
    found = [_Found(entry) for entry in entries]
    sizes = [entry.annotation.stat().st_size if entry.annotation.is_file() else 0 for entry in entries]
    jobs = min(jobs or len(os.sched_getaffinity(0)), -(-sum(sizes) // PIECE) or 1)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress("checking, KiB", sum(sizes) >> 10)) if progress else lambda _: None
        submit = stack.enter_context(_processes(checker, jobs))
        waiting = deque()
        for number, entry in enumerate(entries):
            for piece in _pieces(entry, found[number]):
                waiting.append((number, piece[1], submit(number, *piece)))
                # Results in hand would be all that takes memory.
                if len(waiting) > 4 * jobs:
                    _take(waiting, found, advance)
        while waiting:
            _take(waiting, found, advance)
    return _report(meta, found, processor is not None, max_length, seed)


@contextlib.contextmanager
def _processes(checker, jobs):
    """Give a function that has a piece of a file checked and returns a Future."""
    if jobs == 1:
        yield lambda *piece: _done(checker.check(*piece))
        return
    # Forked processes share tokenizer and libraries; what is never collected is never copied either.
    gc.collect()
    gc.freeze()
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), _become, (checker,))
    try:
        yield lambda *piece: pool.submit(_check, *piece)
    except BrokenProcessPool as error:
        raise UserError("a process that checks lines was killed, perhaps for want of memory: try fewer jobs") from error
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def _done(result):
    future = Future()
    future.set_result(result)
    return future


def _become(checker):
    global _own
    _own = checker
    # The first process alone answers an interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check(*piece):
    return _own.check(*piece)


def _pieces(entry, found):
    """Yield offset and size in bytes, and the number and the index of the first line, of pieces of a file."""
    try:
        file = open(entry.annotation, "rb")
    except (FileNotFoundError, IsADirectoryError):
        what = "is a folder, expected a JSONL file" if entry.annotation.is_dir() else "does not exist"
        found.problem = f"annotation file {entry.annotation} {what}"
        return
    offset, number, index = 0, 1, 0
    with file:
        while piece := file.read(PIECE):
            piece += file.readline()
            yield offset, len(piece), number, index
            lines = piece.split(b"\n")
            offset, number = offset + len(piece), number + len(lines) - 1
            index += sum(map(bool, map(bytes.strip, lines)))
    found.lines = index
    if not index:
        found.problem = f"annotation file {entry.annotation} is empty, expected one JSON object a line"


def _take(waiting, found, advance):
    number, size, future = waiting.popleft()
    measures, bad = future.result()
    found[number].measures.append(measures)
    found[number].bad.update(reason for _, reason, _ in bad)
    found[number].bad_lines += bad[: NAMED - len(found[number].bad_lines)]
    advance(size >> 10)


class _Checker:
    """Checks lines; one in every process."""

    def __init__(self, entries, processor, template, max_length, frames, headers, seed):
        self.entries, self.processor, self.max_length = entries, processor, max_length
        self.frames, self.headers, self.seed = frames, headers, seed
        self.counter = TokenCounter(processor.tokenizer, template) if processor else None
        self.files = [MediaFiles(entry.root) for entry in entries]
        # Nothing merges with a visual token: one an image stands for all of them.
        self.image = processor.expand(IMAGE_PLACEHOLDER, [1], 1) if processor and processor.tokens_per_tile else ""
        self.tiles = {}

    def check(self, source, offset, size, number, index):
        """Check a piece of a file.

        Args:
            source (int): Which entry of the meta file.
            offset (int): Where it begins, in bytes.
            size (int): Bytes.
            number (int): Number of its first line.
            index (int): Lines before it that are not blank.

        Returns:
            tuple[ndarray, list]: Kind, tokens, trained tokens and tiles of every good sample, (N, 4), and number,
            reason and message of every bad line.
        """
        path, good, bad = str(self.entries[source].annotation), [], []
        if len(self.files[source].known) > KEPT:
            self.files[source].known.clear()
        with open(path, "rb") as file:
            file.seek(offset)
            lines = file.read(size).split(b"\n")
        for number, line in enumerate(lines, start=number):
            if line.strip():
                try:
                    good.append(self._measure(line, f"{path}:{number}", source, number, index))
                except BadSample as error:
                    bad.append((number, error.reason, str(error)))
                index += 1
        return np.array(good, dtype=np.int32).reshape(-1, 4), bad

    def _measure(self, line, where, source, number, index):
        fields = check_line(line, where, number, self.files[source], answered=True)
        slots, tiles = self._media(fields, where, source, index)
        kind = 3 if fields["video"] is not None else min(len(fields["images"]), 2)
        if self.counter is None:
            return kind, 0, 0, 0
        tokens, trained = self._count(fields, where, slots)
        tokens += self.processor.tokens_per_tile * tiles - slots
        if tokens > self.max_length:
            raise BadSample(f"{where}: {tokens} tokens, more than max_length={self.max_length}", "too_long")
        if trained <= (fields["text"] is not None and not self.counter.lead):
            message = f"{where}: none of its {tokens} tokens is trained, expected at least one"
            raise BadSample(message, "nothing_trained")
        return kind, tokens, trained, tiles

    def _media(self, fields, where, source, index):
        """tuple[int, int]: Images or frames, and their tiles."""
        names, video = fields["images"], fields["video"]
        if not names and video is None:
            return 0, 0
        if self.processor is not None and not self.processor.tokens_per_tile:
            found = "an image" if names else "a video"
            raise BadSample(f"{where}: names {found}, but the model has no image front end", "no_images_allowed")
        entry = self.entries[source]
        if video is not None:
            if not self.headers:
                fewest = 1 if self.frames.rate else self.frames.min_frames
                return fewest, fewest
            # As ConversationDataset draws them.
            rng = np.random.default_rng([self.seed, index])
            path = entry.root / video
            count = count_frames(path, where, self.frames, fields["clip"], rng)
            if path.is_dir():
                self._look_at_frames(path, where)
            return count, count
        if not self.headers:
            return len(names), len(names)
        limit = self.processor and self.processor.tile_limit(len(names), entry.max_dynamic_patch)
        return len(names), sum(self._tiles(os.path.join(entry.root, name), where, limit) for name in names)

    def _look_at_frames(self, folder, where):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in FRAME_SUFFIXES and isinstance(found := self._known_tiles(str(path), 1), str):
                message = f"{where}: {folder} is not a readable video: {path.name}: {found}"
                raise BadSample(message, "unreadable_video")

    def _tiles(self, path, where, limit):
        found = self._known_tiles(path, limit)
        if isinstance(found, str):
            raise BadSample(f"{where}: {path} is not a readable image: {found}", "unreadable_image")
        return found

    def _known_tiles(self, path, limit):
        if (path, limit) not in self.tiles:
            if len(self.tiles) >= KEPT:
                self.tiles.clear()
            self.tiles[path, limit] = self._read_header(path, limit)
        return self.tiles[path, limit]

    def _read_header(self, path, limit):
        """int | str: Tiles, or why there are none."""
        try:
            with Image.open(path) as image:
                if not _has_end(image):
                    image.load()
                return self.processor.tile_count(image, limit) if self.processor else 1
        except UNREADABLE as error:
            return str(error)

    def _count(self, fields, where, slots):
        ended = fields["ended"]
        if fields["text"] is not None:
            if ended and self.processor.tokenizer.eos_token_id is None:
                message = f"{where}: 'end' is true, but the tokenizer has no end-of-sequence token"
                raise BadSample(message, "format")
            return self.counter.count_text(fields["text"], ended)
        turns = fields["turns"]
        if fields["video"] is not None:
            turns = [(self.frames.caption(question, slots), answer) for question, answer in turns]
        return self.counter.count(turns, fields["system"], ended, [self.image] * slots)


def _has_end(image):
    """bool: Whether the end of an image's file says that it is whole; False where only decoding tells."""
    mark = ENDS.get(image.format)
    if mark is None:
        return False
    position = image.fp.tell()
    image.fp.seek(-min(TAIL, image.fp.seek(0, os.SEEK_END)), os.SEEK_END)
    found = mark in image.fp.read()
    image.fp.seek(position)
    return found


class _Found:
    """What was found in one dataset."""

    def __init__(self, entry):
        self.entry, self.lines, self.problem = entry, 0, None
        self.measures, self.bad, self.bad_lines = [], Counter(), []

    def lengths(self, seed):
        """ndarray: Tokens of the samples of a pass, with ``repeat_time``."""
        tokens = np.concatenate([measures[:, 1] for measures in self.measures])
        return tokens[repeat_lines(len(tokens), self.entry.repeat_time, seed)]

    def report(self, counted):
        """dict: All of it as JSON can hold it; ``None`` for what needs a model."""
        entry, measures = self.entry, np.concatenate([np.zeros((0, 4), dtype=np.int32), *self.measures])
        kinds, tokens, trained, tiles = measures.T.astype(np.int64)
        warnings = []
        if entry.length not in (None, self.lines) and self.lines:
            warnings.append(f"the meta file says length {entry.length:,}, {entry.annotation} has {self.lines:,} lines")
        problem = self.problem
        if problem is None and not len(tokens):
            problem = f"every line of {entry.annotation} is bad"
        # As many as ConversationDataset takes.
        samples = int(entry.repeat_time) * len(tokens) + round(entry.repeat_time % 1 * len(tokens))
        if problem is None and not samples:
            problem = f"repeat_time {entry.repeat_time:g} takes none of {len(tokens):,} samples"
        return {
            "name": entry.name,
            "annotation": str(entry.annotation),
            "lines": self.lines,
            "samples": len(tokens),
            "kinds": {kind: int((kinds == number).sum()) for number, kind in enumerate(KINDS)},
            "bad": dict(self.bad),
            "bad_lines": [dict(zip(("line", "reason", "message"), line)) for line in self.bad_lines],
            "tokens": _spread(tokens) if counted and len(tokens) else None,
            "trained_share": trained.sum() / tokens.sum() if counted and len(tokens) else None,
            "tiles": int(tiles.sum()) if counted else None,
            "repeat_time": entry.repeat_time,
            "samples_per_epoch": samples,
            "tokens_per_epoch": round(tokens.mean() * samples) if counted and len(tokens) else None,
            "problem": problem,
            "warnings": warnings,
        }


def _spread(tokens):
    median, high = (int(value) for value in np.percentile(tokens, (50, 95), method="nearest"))
    return {"min": int(tokens.min()), "median": median, "p95": high, "max": int(tokens.max()), "sum": int(tokens.sum())}


def _report(meta, found, counted, max_length, seed):
    datasets = [one.report(counted) for one in found]
    bad = Counter()
    for dataset in datasets:
        bad.update(dataset["bad"])
    totals = ("lines", "samples", "samples_per_epoch", *(("tiles", "tokens_per_epoch") if counted else ()))
    total = {key: sum(dataset[key] or 0 for dataset in datasets) for key in totals}
    lengths = [one.lengths(seed + number) for number, one in enumerate(found) if one.measures] if counted else []
    return {
        "meta": str(meta),
        "max_length": max_length if counted else None,
        "datasets": datasets,
        "total": {**total, "bad": dict(bad), "bad_share": sum(bad.values()) / max(1, total["lines"])},
        "batches": _batches(np.concatenate(lengths), max_length, seed) if lengths else None,
    }


def _batches(lengths, row_length, seed):
    """Estimate how full batches would be, on a part of the samples.

    Args:
        lengths (ndarray): Tokens of the samples of a pass.
        row_length (int): Tokens of a packed row.
        seed (int): Chooses the samples.

    Returns:
        dict | None: Shares of the room that tokens fill in padded batches and in packed rows.
    """
    lengths = np.random.default_rng(seed).permutation(lengths)[:SAMPLED].astype(np.int64)
    if not len(lengths):
        return None
    rows = np.array_split(lengths, -(-len(lengths) // BATCH))
    padded = sum(int(row.max()) * len(row) for row in rows)
    packed = (first_fit_decreasing(lengths, row_length).max() + 1) * row_length
    return {
        "samples": BATCH,
        "padded_fill": int(lengths.sum()) / padded,
        "row_length": row_length,
        "packed_fill": int(lengths.sum()) / int(packed),
    }
