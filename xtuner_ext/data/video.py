"""Frames of videos: files that FFmpeg reads, GIFs and folders of images.

How many frames a sample takes follows from the video's header, so lengths are counted without decoding.
"""

import contextlib
import dataclasses
import math
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import BadSample, UserError
from ..modeling.processing import IMAGE_PLACEHOLDER
from .annotation import VIDEO_PLACEHOLDER

# Beyond this many seconds it pays to look for a key frame instead of decoding all that lies between.
SEEK_SECONDS = 5.0
# Clips are annotated in rounded seconds.
CLIP_TOLERANCE = 1.0
FRAME_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are shown, and how the text names them.

    ``rand`` and ``middle`` cut the video into as many equal parts as frames are wanted and take a random frame of
    each, or the middle one; a video of fewer frames shows all of them and its last one again until there are enough.
    ``fpsX``, such as ``fps0.5``, shows X frames a second, at most ``max_frames`` from the beginning on.

    Args:
        min_frames (int): Fewest frames of ``rand`` and ``middle``; the number is drawn for every sample.
        max_frames (int): Most frames; the number where nothing is drawn.
        sampling (str): ``rand``, ``middle`` or ``fpsX``.
        frame_prefix (str): Text before each frame, in which ``{i}`` counts from 1.
        folder_fps (float): Frames a second of a folder of frames.

    Raises:
        UserError: For a setting of another type or value.
    """

    min_frames: int = 8
    max_frames: int = 32
    sampling: str = "rand"
    frame_prefix: str = "Frame-{i}: "
    folder_fps: float = 1.0

    def __post_init__(self):
        fewest, most = self.min_frames, self.max_frames
        if not (isinstance(fewest, int) and isinstance(most, int) and 1 <= fewest <= most):
            raise UserError(f"frames: min_frames {fewest!r} to max_frames {most!r}, expected 1 or more, fewest first")
        if self.sampling not in ("rand", "middle") and not self.rate > 0:
            raise UserError(f"frames: sampling is {self.sampling!r}, expected rand, middle or fps and a number")
        if not (isinstance(self.folder_fps, (int, float)) and self.folder_fps > 0):
            raise UserError(f"frames: folder_fps is {self.folder_fps!r}, expected a number above 0")
        if not isinstance(self.frame_prefix, str) or IMAGE_PLACEHOLDER in self.frame_prefix:
            raise UserError(f"frames: frame_prefix is {self.frame_prefix!r}, expected text, perhaps with {{i}}")

    @classmethod
    def of(cls, settings):
        """FrameSampling: Of a config's dict, or of None, which takes the defaults.

        Raises:
            UserError: For an unknown key.
        """
        if isinstance(settings, cls):
            return settings
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(settings or {}) - set(known)):
            raise UserError(f"frames has unknown key {unknown[0]!r}, expected {known}")
        return cls(**(settings or {}))

    @property
    def rate(self):
        """float: X of ``fpsX``, 0 for the others."""
        found = re.fullmatch(r"fps(\d+(?:\.\d+)?)", str(self.sampling))
        return float(found[1]) if found else 0.0

    def caption(self, text, count):
        """str: Text in which the placeholder of a video is replaced by those of its frames."""
        frames = (f"{self.frame_prefix.replace('{i}', str(i + 1))}{IMAGE_PLACEHOLDER}" for i in range(count))
        return text.replace(VIDEO_PLACEHOLDER, "\n".join(frames))

    def choose(self, total, fps, clip=None, rng=None):
        """Choose frames.

        Args:
            total (int): Frames of the video.
            fps (float): Frames a second.
            clip (tuple[float, float], optional): Start and end of the part to choose from, in seconds.
            rng (np.random.Generator, optional): Draws the number of frames and, for ``rand``, the frames. Without it
                there are ``max_frames``, and ``rand`` is ``middle``.

        Returns:
            list[int]: Frame numbers from 0, not falling.

        Raises:
            ValueError: For a clip outside the video.
        """
        first, last = 0, total
        if clip is not None:
            if clip[0] * fps >= total or clip[1] > total / fps + CLIP_TOLERANCE:
                raise ValueError(f"'clip' is {list(clip)}, expected times within its {total / fps:.2f} seconds")
            # Not by what a product is wrong in its last digits.
            first = min(total - 1, math.floor(clip[0] * fps + 1e-6))
            last = max(first + 1, min(total, math.ceil(clip[1] * fps - 1e-6)))
        count = last - first
        if self.rate:
            seconds = (np.arange(self.max_frames) + 0.5) / self.rate
            chosen = np.rint(seconds * fps).astype(int)
            chosen = chosen[chosen < count]
            # A video shorter than half a gap still shows something.
            return (first + chosen).tolist() if len(chosen) else [first + count // 2]
        wanted = self.max_frames if rng is None else int(rng.integers(self.min_frames, self.max_frames + 1))
        edges = np.linspace(0, count, min(wanted, count) + 1).astype(int)
        if self.sampling == "middle" or rng is None:
            chosen = (edges[:-1] + edges[1:] - 1) // 2
        else:
            chosen = rng.integers(edges[:-1], edges[1:])
        chosen = (first + chosen).tolist()
        return chosen + chosen[-1:] * (wanted - len(chosen))


def count_frames(path, where, sampling, clip=None, rng=None):
    """Count the frames that :func:`read_frames` gives, from the header of the video.

    Args:
        path (Path): Video file, GIF or folder of images.
        where (str): ``file:line`` that names it.
        sampling (FrameSampling): Settings.
        clip (tuple[float, float], optional): Start and end, in seconds.
        rng (np.random.Generator, optional): In the state in which ``read_frames`` will get it.

    Returns:
        int: Frames.

    Raises:
        BadSample: For a video that is missing or cannot be read, or a clip outside it.
    """
    with _video(path, where, sampling) as video:
        return len(_chosen(video, path, where, sampling, clip, rng))


def read_frames(path, where, sampling, clip=None, rng=None):
    """Read the chosen frames of a video.

    Args:
        path (Path): Video file, GIF or folder of images, which are sorted by the last number in their names.
        where (str): ``file:line`` that names it.
        sampling (FrameSampling): Settings.
        clip (tuple[float, float], optional): Start and end, in seconds.
        rng (np.random.Generator, optional): See :meth:`FrameSampling.choose`.

    Yields:
        PIL.Image.Image: RGB frames in order; one that is chosen again is the same object.

    Raises:
        BadSample: For a video that is missing or cannot be read, or a clip outside it.
    """
    with _video(path, where, sampling) as video:
        numbers = _chosen(video, path, where, sampling, clip, rng)
        images = video.read(sorted(set(numbers)))
        last = image = None
        for number in numbers:
            if number != last:
                last, image = number, next(images)
            yield image


def _chosen(video, path, where, sampling, clip, rng):
    try:
        return sampling.choose(video.total, video.fps, clip, rng)
    except ValueError as error:
        raise BadSample(f"{where}: video {path}: {error}", "format") from error


@contextlib.contextmanager
def _video(path, where, sampling):
    path = Path(path)
    try:
        if path.is_dir():
            yield _Folder(path, sampling.folder_fps)
        elif path.suffix.lower() == ".gif":
            with Image.open(path) as image:
                yield _Gif(image)
        else:
            import av

            with av.open(os.fspath(path)) as container:
                yield _Container(container)
    except FileNotFoundError as error:
        raise BadSample(f"{where}: video {path} does not exist", "missing_file") from error
    except _unreadable() as error:
        raise BadSample(f"{where}: {path} is not a readable video: {error}", "unreadable_video") from error


def _unreadable():
    import av

    return (av.error.FFmpegError, OSError, ValueError, SyntaxError, EOFError, LookupError)


class _Folder:
    """Images in the order of the numbers in their names."""

    def __init__(self, path, fps):
        names = [name for name in os.listdir(path) if Path(name).suffix.lower() in FRAME_SUFFIXES]
        if not names:
            raise ValueError("the folder holds no images, expected one a frame")
        self.paths = [path / name for name in sorted(names, key=_frame_number)]
        self.total, self.fps = len(names), fps

    def read(self, numbers):
        for number in numbers:
            with Image.open(self.paths[number]) as image:
                yield image.convert("RGB")


def _frame_number(name):
    numbers = re.findall(r"\d+", Path(name).stem)
    return int(numbers[-1]) if numbers else -1, name


class _Gif:
    """A GIF, whose frames are taken to last as long as the first."""

    def __init__(self, image):
        self.image, self.total = image, image.n_frames
        self.fps = 1000 / (image.info.get("duration") or 100)

    def read(self, numbers):
        for number in numbers:
            self.image.seek(number)
            yield self.image.convert("RGB")


class _Container:
    """The first video stream of a file that FFmpeg reads; frames are found by their times."""

    def __init__(self, container):
        # Takes its time, and only those who have videos need it.
        import av

        if not container.streams.video:
            raise ValueError("it has no video stream")
        self.container, self.stream = container, container.streams.video[0]
        stream = self.stream
        self.fps = float(stream.average_rate or stream.guessed_rate or 25)
        seconds = None
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / av.time_base
        self.start = float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0
        # Without times there is nothing to look for.
        self.seekable = seconds is not None
        self.total = stream.frames or round((seconds or 0) * self.fps)
        if not self.total:
            # A bare stream, which cannot be wound back either.
            with av.open(container.name) as again:
                self.total = sum(packet.size > 0 for packet in again.demux(again.streams.video[0]))
        if not self.total:
            raise ValueError("it has no frame")
        # Sound may go on after the last frame, so only the stream itself tells that frames are lost.
        self.known_end = bool(stream.frames or stream.duration)

    def read(self, numbers):
        frames, current, ahead, position = self._decode(0), None, None, -1.0
        for number in numbers:
            # The frame that is shown in the middle of this one's time.
            target = (number + 0.5) / self.fps
            if self.seekable and target - position > SEEK_SECONDS:
                frames, ahead = self._seek(target)
            while True:
                ahead = ahead or next(frames, None)
                if ahead is None or (current is not None and ahead[0] > target):
                    break
                current, ahead = ahead, None
                position = current[0]
            if current is None:
                raise ValueError("no frame could be decoded")
            if self.known_end and ahead is None and target - position > max(CLIP_TOLERANCE, 5 / self.fps):
                raise ValueError(f"it ends after {position:.2f} of {self.total / self.fps:.2f} seconds")
            yield _upright(current[1])

    def _seek(self, target):
        """Frames from a key frame before a time on, and the first of them."""
        back = 0.0
        while True:
            begin = max(0.0, target - back)
            self.container.seek(round((begin + self.start) / self.stream.time_base), stream=self.stream)
            frames = self._decode(None)
            ahead = next(frames, None)
            if begin == 0 or (ahead is not None and ahead[0] <= target):
                return frames, ahead
            # Without an index, as in MPEG-TS, the first key frame after the place that was guessed is found.
            back = 2 * back or 1.0

    def _decode(self, number):
        """Time in seconds and frame, of all from here on; ``number`` counts where the file has no times."""
        for frame in self.container.decode(self.stream):
            if frame.time is not None:
                yield frame.time - self.start, frame
            elif number is not None:
                yield number / self.fps, frame
            if number is not None:
                number += 1


def _upright(frame):
    image = frame.to_image()
    # Phones film in one direction and note how they were held, in degrees counter-clockwise.
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
