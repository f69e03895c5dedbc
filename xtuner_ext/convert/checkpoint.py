"""Reading weight folders and writing folders that appear whole or not at all."""

import contextlib
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError


def read_config_json(folder):
    """Read a model folder's config.json.

    Args:
        folder (str | Path): Model folder.

    Returns:
        dict: Its content.

    Raises:
        UserError: When folder or file is missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"model folder {folder} has no config.json")
    return read_json(path)


def read_json(path):
    """Read a JSON file.

    Args:
        path (Path): Existing file.

    Returns:
        dict: Its content.

    Raises:
        UserError: When it is broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def weight_files(folder):
    """The weight files of a model folder, by its index when it has one; safetensors before pickled tensors.

    Args:
        folder (str | Path): Model folder.

    Returns:
        list[Path]: Existing files.

    Raises:
        UserError: When a file is missing.
    """
    folder, singles = Path(folder), ("model.safetensors", "pytorch_model.bin")
    for single in singles:
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            for name in names:
                if not (folder / name).is_file():
                    raise UserError(f"{index} names {name}, which does not exist")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    expected = [name for single in singles for name in (single, f"{single}.index.json")]
    raise UserError(f"model folder {folder} has no weights, expected one of {', '.join(expected)}")


def read_state(folder):
    """Read all tensors of a model folder.

    Args:
        folder (str | Path): Model folder.

    Returns:
        dict[str, Tensor]: By the names in the files.

    Raises:
        UserError: For a missing or damaged file.
    """
    state = {}
    for path in weight_files(folder):
        state.update(_read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path))
    return state


def _read_safetensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def _read_pickled(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is not a readable file of tensors: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def whole_folder(target):
    """Write a folder under a temporary name and rename it at the end.

    Args:
        target (str | Path): Final name; what stands there is replaced only when all went well.

    Yields:
        Path: The temporary folder to write into.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield work
        work.chmod(0o755)
        for path in work.rglob("*"):
            if path.is_file():
                # Temporary files and some writers are private to their owner; a model folder is not.
                path.chmod(0o644)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            target.rename(old / "old")
            work.rename(target)
            shutil.rmtree(old)
        else:
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
