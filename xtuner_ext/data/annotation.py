"""InternVL's meta JSON and JSONL annotations of conversations or plain text, checked when they are opened."""

import dataclasses
import hashlib
import json
import mmap
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..modeling.processing import IMAGE_PLACEHOLDER

META_KEYS = {"root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch"}
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclasses.dataclass(frozen=True)
class Record:
    """One checked annotation line.

    Attributes:
        id (object): The line's own id, or its line number.
        images (list[Path]): Image files in the order of their placeholders.
        turns (list[tuple[str, str]]): Questions (with ``<image>``) and answers; none in plain text.
        system (str | None): System message.
        text (str | None): Plain text, in place of turns.
        ended (bool): Whether the last answer, or the text, ends here and that end is trained.
        category (str): Question kind, for scores.
        where (str): ``file:line``, for messages.
    """

    id: object
    images: list
    turns: list
    system: str | None
    text: str | None
    ended: bool
    category: str
    where: str


@dataclasses.dataclass(frozen=True)
class MetaEntry:
    """One dataset of a meta JSON: name, annotation file, image root and mixing weight."""

    name: str
    annotation: Path
    root: Path
    repeat_time: float = 1.0
    max_dynamic_patch: int | None = None


def read_meta(path):
    """Read a meta JSON.

    Args:
        path (str | Path): ``{name: {root, annotation, data_augment, repeat_time, length,
            max_dynamic_patch}}``; relative paths count from the meta file's folder.

    Returns:
        list[MetaEntry]: One entry per dataset.

    Raises:
        UserError: For a missing file, broken JSON, an unknown or missing key.
    """
    path = Path(path)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"meta file {path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"meta file {path} is not valid JSON: {error}") from error
    if not isinstance(meta, dict) or not meta:
        raise UserError(f"meta file {path} must hold at least one dataset, as {{name: {{...}}}}")
    entries = []
    for name, fields in meta.items():
        if not isinstance(fields, dict):
            raise UserError(f"{path}: dataset {name!r} is {type(fields).__name__}, expected an object")
        if unknown := sorted(set(fields) - META_KEYS):
            raise UserError(f"{path}: dataset {name!r} has unknown key {unknown[0]!r}, expected {sorted(META_KEYS)}")
        if "annotation" not in fields:
            raise UserError(f"{path}: dataset {name!r} has no key 'annotation'")
        repeat_time = fields.get("repeat_time", 1)
        if not isinstance(repeat_time, (int, float)) or repeat_time <= 0:
            raise UserError(f"{path}: dataset {name!r} has repeat_time {repeat_time!r}, expected a number above 0")
        for key in ("annotation", "root"):
            if not isinstance(fields.get(key, "."), str):
                raise UserError(f"{path}: dataset {name!r} has {key} {fields[key]!r}, expected a path")
        tiles = fields.get("max_dynamic_patch")
        if tiles is not None and (not isinstance(tiles, int) or tiles < 1):
            raise UserError(f"{path}: dataset {name!r} has max_dynamic_patch {tiles!r}, expected 1 tile or more")
        entries.append(
            MetaEntry(
                name=name,
                annotation=path.parent / fields["annotation"],
                root=path.parent / fields.get("root", "."),
                repeat_time=float(repeat_time),
                max_dynamic_patch=tiles,
            )
        )
    return entries


class JsonlAnnotations:
    """A JSONL file, memory-mapped; every line is checked once, when the file is opened.

    Args:
        path (Path): Annotation file.
        root (Path): Folder that image paths start from.

    Raises:
        UserError: For a missing or empty file, a malformed line, a missing image, or an image count that
            does not equal the placeholders; the message names file and line.

    Attributes:
        digest (str): SHA-256 of the file.
    """

    def __init__(self, path, root):
        self.path, self.root = Path(path), Path(root)
        if not self.path.is_file():
            raise UserError(f"annotation file {self.path} does not exist")
        offsets, numbers, position = [], [], 0
        known_files, digest = set(), hashlib.sha256()
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    record = parse_record(line, f"{self.path}:{number}", self.root, number)
                    for image in record.images:
                        if image not in known_files and not image.is_file():
                            raise UserError(f"{record.where}: image {image} does not exist")
                        known_files.add(image)
                    offsets.append((position, position + len(line)))
                    numbers.append(number)
                position += len(line)
        if not offsets:
            raise UserError(f"annotation file {self.path} is empty, expected one JSON object a line")
        self._offsets = np.asarray(offsets, dtype=np.int64)
        self._numbers = np.asarray(numbers, dtype=np.int64)
        self.digest = digest.hexdigest()
        self._map = None

    def __len__(self):
        return len(self._offsets)

    def __getitem__(self, index):
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, end = self._offsets[index]
        number = int(self._numbers[index])
        return parse_record(self._map[start:end], f"{self.path}:{number}", self.root, number)

    def __getstate__(self):
        # A map cannot be sent to a worker process; each opens its own.
        return {**self.__dict__, "_map": None}


def parse_record(line, where, root, number):
    """Check one annotation line.

    A line holds ``conversations``, perhaps with ``image``, or ``text``. ``"end": false`` says that the last
    answer was cut off, ``"end": true`` that a text is whole; an end token is trained only where there is an end.

    Args:
        line (bytes): JSON text.
        where (str): ``file:line`` for messages.
        root (Path): Folder that image paths start from.
        number (int): Line number, the id of a line without one.

    Returns:
        Record: The checked record.

    Raises:
        UserError: Naming the line, what was found and what was expected.
    """
    try:
        item = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: malformed JSON: {error}") from error
    if not isinstance(item, dict) or not {"conversations", "text"} & set(item):
        raise UserError(f"{where}: expected an object with a list 'conversations' or a 'text'")
    images = item.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"{where}: 'image' is {item['image']!r}, expected a path or a list of paths")
    ended = item.get("end", "conversations" in item)
    if not isinstance(ended, bool):
        raise UserError(f"{where}: 'end' is {ended!r}, expected true or false")
    common = dict(id=item.get("id", number), ended=ended, category=str(item.get("category", "all")), where=where)
    if "text" in item:
        return Record(text=_text(item, images, where), images=[], turns=[], system=None, **common)
    if not isinstance(item["conversations"], list):
        raise UserError(f"{where}: 'conversations' is {type(item['conversations']).__name__}, expected a list")
    system, turns = _turns(item["conversations"], where)
    placeholders = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in turns)
    if len(images) == 1 and placeholders == 0:
        turns[0] = (f"{IMAGE_PLACEHOLDER}\n{turns[0][0]}", turns[0][1])
        placeholders = 1
    if placeholders != len(images):
        raise UserError(f"{where}: {len(images)} images but {placeholders} {IMAGE_PLACEHOLDER} placeholders")
    return Record(text=None, images=[root / image for image in images], turns=turns, system=system, **common)


def _text(item, images, where):
    if "conversations" in item:
        raise UserError(f"{where}: has both 'text' and 'conversations', expected one of them")
    if not isinstance(item["text"], str):
        raise UserError(f"{where}: 'text' is {type(item['text']).__name__}, expected a string")
    if not item["text"].strip():
        raise UserError(f"{where}: 'text' is empty")
    if images:
        raise UserError(f"{where}: has images beside 'text', expected them with 'conversations' only")
    return item["text"]


def _turns(conversations, where):
    system, messages = None, []
    for position, message in enumerate(conversations):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise UserError(f"{where}: conversations[{position}] has no text 'value'")
        if IMAGE_PLACEHOLDER in message["value"] and ROLES.get(message.get("from")) != "human":
            raise UserError(f"{where}: conversations[{position}] has {IMAGE_PLACEHOLDER} outside a question")
        if message.get("from") == "system" and position == 0:
            system = message["value"]
            continue
        if message.get("from") not in ROLES:
            raise UserError(f"{where}: conversations[{position}] is from {message.get('from')!r}, expected human or gpt")
        messages.append((ROLES[message["from"]], message["value"].strip()))
    expected = ["human", "gpt"] * (len(messages) // 2)
    if not messages or [role for role, _ in messages] != expected:
        raise UserError(f"{where}: conversations must alternate human and gpt and end with gpt")
    return system, [(messages[i][1], messages[i + 1][1]) for i in range(0, len(messages), 2)]
