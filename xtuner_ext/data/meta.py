"""InternVL's meta JSON: which datasets there are, where they lie, and how much of each is taken."""

import dataclasses
import json
import math
from pathlib import Path

from ..errors import UserError

META_KEYS = {"root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch"}


@dataclasses.dataclass(frozen=True)
class MetaEntry:
    """One dataset of a meta JSON: name, annotation file, image root and mixing weight."""

    name: str
    annotation: Path
    root: Path
    repeat_time: float = 1.0
    max_dynamic_patch: int | None = None
    augment: bool = False
    length: int | None = None


def read_meta(path):
    """Read a meta JSON.

    Args:
        path (str | Path): ``{name: {root, annotation, data_augment, repeat_time, length,
            max_dynamic_patch}}``; relative paths count from the meta file's folder.

    Returns:
        list[MetaEntry]: One entry per dataset.

    Raises:
        UserError: For a missing file, broken JSON, a name used twice, an unknown or missing key, a broken value.
    """
    path = Path(path)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except FileNotFoundError as error:
        raise UserError(f"meta file {path} does not exist") from error
    except OSError as error:
        raise UserError(f"meta file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"meta file {path} is not valid JSON: {error}") from error
    if not isinstance(meta, dict) or not meta:
        raise UserError(f"meta file {path} must hold at least one dataset, as {{name: {{...}}}}")
    return [_entry(path, name, fields) for name, fields in meta.items()]


def _unique(pairs, path):
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        # JSON would keep the last one and lose the others' samples.
        raise UserError(f"meta file {path} has {twice[0]!r} twice, expected every name once")
    return dict(pairs)


def _entry(path, name, fields):
    if not isinstance(fields, dict):
        raise UserError(f"{path}: dataset {name!r} is {type(fields).__name__}, expected an object")
    if unknown := sorted(set(fields) - META_KEYS):
        raise UserError(f"{path}: dataset {name!r} has unknown key {unknown[0]!r}, expected {sorted(META_KEYS)}")
    if "annotation" not in fields:
        raise UserError(f"{path}: dataset {name!r} has no key 'annotation'")

    def check(key, good, expected):
        if key in fields and not good(fields[key]):
            raise UserError(f"{path}: dataset {name!r} has {key} {fields[key]!r}, expected {expected}")

    check("repeat_time", lambda value: is_number(value) and value > 0, "a number above 0")
    for key in ("annotation", "root"):
        check(key, lambda value: isinstance(value, str) and "\0" not in value, "a path")
    check("max_dynamic_patch", lambda value: value is None or _is_count(value) and value > 0, "1 tile or more")
    check("data_augment", lambda value: isinstance(value, bool), "true or false")
    check("length", lambda value: value is None or _is_count(value), "the number of lines")
    return MetaEntry(
        name=name,
        annotation=path.parent / fields["annotation"],
        root=path.parent / fields.get("root", "."),
        repeat_time=float(fields.get("repeat_time", 1)),
        max_dynamic_patch=fields.get("max_dynamic_patch"),
        augment=fields.get("data_augment", False),
        length=fields.get("length"),
    )


def is_number(value):
    """bool: Whether a value of JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
