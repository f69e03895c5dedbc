"""JSONL annotations of conversations or plain text, checked when they are opened."""

import dataclasses
import hashlib
import json
import mmap
import os
import re
import stat
from array import array
from pathlib import Path

import numpy as np

from ..errors import BadSample, UserError
from ..modeling.processing import IMAGE_PLACEHOLDER
from .meta import is_number

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
VIDEO_PLACEHOLDER = "<video>"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclasses.dataclass(slots=True)
class Record:
    """One checked annotation line.

    Attributes:
        id (object): The line's own id, or its line number.
        images (list[Path]): Image files in the order of their placeholders.
        turns (list[tuple[str, str]]): Questions (with ``<image>`` or ``<video>``) and answers; none in plain text.
        system (str | None): System message.
        text (str | None): Plain text, in place of turns.
        ended (bool): Whether the last answer, or the text, ends here and that end is trained.
        category (str): Question kind, for scores.
        where (str): ``file:line``, for messages.
        video (Path | None): A video file, or a folder of frames.
        clip (tuple[float, float] | None): Start and end in the video, in seconds.
    """

    id: object
    images: list
    turns: list
    system: str | None
    text: str | None
    ended: bool
    category: str
    where: str
    video: Path | None = None
    clip: tuple | None = None

    @property
    def kind(self):
        """str: ``text``, ``image``, ``images`` or ``video``."""
        if self.video is not None:
            return "video"
        return ("text", "image", "images")[min(len(self.images), 2)]


class JsonlAnnotations:
    """A JSONL file, memory-mapped; every line is checked once, when the file is opened.

    A line that is not blank is an entry, whether it is good or bad, so that its index follows from the file alone and
    not from the images that happen to be there.

    Args:
        path (Path): Annotation file.
        root (Path): Folder that image and video paths start from.
        on_bad (callable, optional): Called with the index, the line's number and the ``BadSample`` for every bad
            line; by default the first one is raised.
        answered (bool): Whether a conversation without any answer is bad, as nothing in it could be trained.

    Raises:
        UserError: For a missing or empty file.
        BadSample: For a malformed line, a missing image or video, or an image count that does not equal the
            placeholders; the message names file and line.

    Attributes:
        digest (str): SHA-256 of the file.
        good (ndarray): Indices of the good lines, int64.
        has_video (bool): Whether any good line has a video.
    """

    def __init__(self, path, root, on_bad=None, answered=False):
        self.path, self.root = Path(path), Path(root)
        if not self.path.is_file():
            found = "is a folder, expected a JSONL file" if self.path.is_dir() else "does not exist"
            raise UserError(f"annotation file {self.path} {found}")
        starts, numbers, bad = array("q"), array("q"), array("q")
        digest, files, position, self.has_video = hashlib.sha256(), MediaFiles(self.root), 0, False
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if not line.isspace():
                    try:
                        fields = check_line(line, f"{self.path}:{number}", number, files, answered)
                        self.has_video |= fields["video"] is not None
                    except BadSample as error:
                        if on_bad is None:
                            raise
                        on_bad(len(starts), number, error)
                        bad.append(len(starts))
                    starts.append(position)
                    numbers.append(number)
                position += len(line)
        if not starts:
            raise UserError(f"annotation file {self.path} is empty, expected one JSON object a line")
        self._starts, self._numbers = np.array(starts), np.array(numbers)
        self.good = np.delete(np.arange(len(starts)), np.array(bad)) if bad else np.arange(len(starts))
        self.digest = digest.hexdigest()
        self._map = None

    def __len__(self):
        return len(self._starts)

    def __getitem__(self, index):
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self._starts[index])
        end = self._map.find(b"\n", start)
        number = self.number(index)
        line = self._map[start : end if end >= 0 else len(self._map)]
        return parse_record(line, f"{self.path}:{number}", self.root, number)

    def __getstate__(self):
        # A map cannot be sent to a worker process; each opens its own.
        return {**self.__dict__, "_map": None}

    def number(self, index):
        """int: Number of a line in the file, from 1."""
        return int(self._numbers[index])


def check_line(line, where, number, files, answered=False):
    """Check one annotation line and that its files are there.

    Args:
        line (bytes): JSON text.
        where (str): ``file:line`` for messages.
        number (int): Line number.
        files (MediaFiles): Looks at files.
        answered (bool): Whether a conversation without any answer is bad.

    Returns:
        dict: The arguments of a :class:`Record`, but with the names of its files as they are in the line.

    Raises:
        BadSample: Naming the line, what was found and what was expected.
    """
    fields = _parse(line, where, number)
    if answered and fields["text"] is None and not any(answer for _, answer in fields["turns"]):
        raise BadSample(f"{where}: every answer is empty, expected something to train", "nothing_trained")
    for image in fields["images"]:
        files.check(image, where)
    if fields["video"] is not None:
        files.check(fields["video"], where, "video")
    return fields


class MediaFiles:
    """Looks once at every file that lines name.

    Args:
        root (Path): Folder that the names start from.
    """

    def __init__(self, root):
        self.root = os.fspath(root)
        # Of their names the hashes, as there may be millions.
        self.known = set()

    def check(self, name, where, kind="image"):
        """Insist that a file is there.

        Args:
            name (str): Path below the root.
            where (str): ``file:line`` for messages.
            kind (str): ``image``, which may not be a folder, or ``video``.

        Raises:
            BadSample: When it is missing.
        """
        key = hash((kind, name))
        if key in self.known:
            return
        path = os.path.join(self.root, name)
        try:
            mode = os.stat(path).st_mode
        except (OSError, ValueError) as error:
            raise BadSample(f"{where}: {kind} {Path(path)!s} does not exist", "missing_file") from error
        if kind == "image" and stat.S_ISDIR(mode):
            raise BadSample(f"{where}: image {path} is a folder, expected a file", "unreadable_image")
        self.known.add(key)


def parse_record(line, where, root, number):
    """Check one annotation line.

    A line holds ``conversations``, perhaps with ``image`` or ``video``, or ``text``. A single image or a video that no
    question has a placeholder for gets one in front of the first question. ``"end": false`` says that the last
    answer was cut off, ``"end": true`` that a text is whole; an end token is trained only where there is an end.

    Args:
        line (bytes): JSON text.
        where (str): ``file:line`` for messages.
        root (Path): Folder that image and video paths start from.
        number (int): Line number, the id of a line without one.

    Returns:
        Record: The checked record; whether its files are there is not looked at.

    Raises:
        BadSample: Naming the line, what was found and what was expected.
    """
    fields = _parse(line, where, number)
    fields["images"] = [root / image for image in fields["images"]]
    if fields["video"] is not None:
        fields["video"] = root / fields["video"]
    return Record(**fields)


def _parse(line, where, number):
    item = _load(line, where)
    images, video, clip = _media(item, where)
    ended = item.get("end", "conversations" in item)
    if not isinstance(ended, bool):
        raise BadSample(f"{where}: 'end' is {ended!r}, expected true or false", "format")
    text, system, turns = None, None, []
    if "text" in item:
        text = _text(item, images or video, where)
    else:
        if not isinstance(item["conversations"], list):
            found = type(item["conversations"]).__name__
            raise BadSample(f"{where}: 'conversations' is {found}, expected a list", "conversation")
        system, turns = _turns(item["conversations"], where)
        _place(turns, len(images), IMAGE_PLACEHOLDER, "images", where)
        _place(turns, int(video is not None), VIDEO_PLACEHOLDER, "videos", where)
    return {
        "id": item.get("id", number),
        "images": images,
        "turns": turns,
        "system": system,
        "text": text,
        "ended": ended,
        "category": str(item.get("category", "all")),
        "where": where,
        "video": video,
        "clip": clip,
    }


def _load(line, where):
    try:
        item = json.loads(line.rstrip().decode("utf-8-sig"))
        if _SURROGATE.search(line):
            # Half a character: no tokenizer takes it, nor a file system.
            json.dumps(item, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise BadSample(f"{where}: malformed JSON: {error.msg} at character {error.pos + 1}", "json") from error
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{where}: malformed JSON: {error}", "json") from error
    if not isinstance(item, dict) or not ("conversations" in item or "text" in item):
        found = f"an object with {sorted(item)}" if isinstance(item, dict) else type(item).__name__
        expected = "expected an object with a list 'conversations' or a 'text'"
        raise BadSample(f"{where}: is {found}, {expected}", "format")
    return item


def _media(item, where):
    images = item.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise BadSample(f"{where}: 'image' is {item['image']!r}, expected a path or a list of paths", "format")
    video = item.get("video") or None
    if video is None:
        return images, None, None
    if not isinstance(video, str):
        raise BadSample(f"{where}: 'video' is {video!r}, expected a path", "format")
    if images:
        raise BadSample(f"{where}: has both 'image' and 'video', expected one of them", "format")
    clip = item.get("clip")
    if clip is None:
        return images, video, None
    times = isinstance(clip, list) and len(clip) == 2 and all(is_number(time) for time in clip)
    if not times or not 0 <= clip[0] < clip[1]:
        raise BadSample(f"{where}: 'clip' is {clip!r}, expected [start, end] in seconds, start before end", "format")
    return images, video, (float(clip[0]), float(clip[1]))


def _text(item, media, where):
    if "conversations" in item:
        raise BadSample(f"{where}: has both 'text' and 'conversations', expected one of them", "format")
    if not isinstance(item["text"], str):
        raise BadSample(f"{where}: 'text' is {type(item['text']).__name__}, expected a string", "format")
    if not item["text"].strip():
        raise BadSample(f"{where}: 'text' is empty", "nothing_trained")
    if media:
        kind = "a video" if isinstance(media, str) else "images"
        raise BadSample(f"{where}: has {kind} beside 'text', expected them with 'conversations' only", "format")
    return item["text"]


def _turns(conversations, where):
    system, messages = None, []
    for position, message in enumerate(conversations):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            found = f"an object with {sorted(message)}" if isinstance(message, dict) else type(message).__name__
            if isinstance(message, dict) and "value" in message:
                found = f"an object with value {message['value']!r}"
            raise BadSample(
                f"{where}: conversations[{position}] has no text 'value', it is {found}, expected 'from' and 'value'",
                "conversation",
            )
        role, text = message.get("from"), message["value"]
        known = ROLES.get(role) if isinstance(role, str) else None
        for placeholder in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
            if known != "human" and placeholder in text:
                found = f"{where}: conversations[{position}] has {placeholder} outside a question"
                raise BadSample(f"{found}, expected it in those of human only", "placeholder")
        if role == "system" and position == 0:
            system = text
            continue
        if known is None:
            raise BadSample(
                f"{where}: conversations[{position}] is from {role!r}, expected human or gpt", "conversation"
            )
        messages.append((known, text.strip()))
    roles = [role for role, _ in messages]
    if not messages or roles != ["human", "gpt"] * (len(messages) // 2):
        found = " ".join(roles[:8]) + (" ..." if len(roles) > 8 else "") if roles else "no turn"
        raise BadSample(
            f"{where}: conversations must alternate human and gpt and end with gpt, found {found}", "conversation"
        )
    return system, [(messages[i][1], messages[i + 1][1]) for i in range(0, len(messages), 2)]


def _place(turns, count, placeholder, what, where):
    """Put a placeholder in front where a single one is missing; refuse any other number than ``count``."""
    found = sum(question.count(placeholder) for question, _ in turns)
    if count == 1 and found == 0:
        turns[0] = (f"{placeholder}\n{turns[0][0]}", turns[0][1])
    elif found != count:
        raise BadSample(f"{where}: {count} {what} but {found} {placeholder} placeholders", "placeholder")
