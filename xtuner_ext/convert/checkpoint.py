"""Reading model folders and writing folders that appear whole or not at all."""

import contextlib
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError

GGUF_COMMAND = "xtuner-ext convert gguf_to_hf {} DIR"
# As safetensors writes them; other types are packed and do not get here.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


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
    if folder.is_file() and folder.suffix == ".gguf":
        raise UserError(f"{folder} is a GGUF file, unpack it first: {GGUF_COMMAND.format(folder)}")
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    path = folder / "config.json"
    if not path.is_file():
        _refuse_gguf(folder)
        raise UserError(f"model folder {folder} has no config.json")
    return read_json(path)


def read_json(path):
    """Read a JSON file.

    Args:
        path (Path): Existing file.

    Returns:
        dict: Its content.

    Raises:
        UserError: When it is broken or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def find_dtype(name, key="dtype"):
    """Look a floating-point type up.

    Args:
        name (str): Such as ``"bfloat16"``.
        key (str): Names the setting in the message.

    Returns:
        torch.dtype: The type.

    Raises:
        UserError: For another word.
    """
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"{key} is {name!r}, expected 'float32', 'bfloat16' or another floating-point type of torch")
    return dtype


def weight_files(folder):
    """The weight files of a model folder, by its index when it has one; safetensors before pickles.

    Args:
        folder (str | Path): Model folder.

    Returns:
        list[Path]: Existing files.

    Raises:
        UserError: When a file is missing.
    """
    folder = Path(folder)
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = sorted(set(_weight_map(index).values()))
            for name in names:
                if not (folder / name).is_file():
                    raise UserError(f"{index} names {name}, which does not exist")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    _refuse_gguf(folder)
    raise UserError(
        f"model folder {folder} has neither model.safetensors nor model.safetensors.index.json nor pytorch_model.bin"
    )


def read_state(folder, structure_only=False):
    """Read all tensors of a model folder.

    Args:
        folder (str | Path): Model folder.
        structure_only (bool): Read shapes and dtypes; the tensors are on meta.

    Returns:
        dict[str, Tensor]: By the names in the files.

    Raises:
        UserError: For a missing or damaged file.
    """
    state = {}
    for path in weight_files(folder):
        state.update((_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path, structure_only))
    return state


def _read_safetensors(path, structure_only):
    try:
        with safe_open(path, framework="pt") as file:
            if not structure_only:
                return {key: file.get_tensor(key) for key in file.keys()}
            views = {key: file.get_slice(key) for key in file.keys()}
            return {
                key: torch.empty(view.get_shape(), dtype=DTYPES.get(view.get_dtype(), torch.uint8), device="meta")
                for key, view in views.items()
            }
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def _read_pickle(path, structure_only):
    try:
        # Files older than torch 1.6 are no archives and can not be mapped into memory.
        mapped = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="meta" if structure_only else "cpu", weights_only=True, mmap=mapped)
    except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a readable file of weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds more than named tensors, expected a model's weights alone")
    return state


def _weight_map(index):
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} is no index of weight files: its weight_map does not name a file for each tensor")
    return files


def _refuse_gguf(folder):
    if files := sorted(folder.glob("*.gguf")):
        command = GGUF_COMMAND.format(files[0])
        raise UserError(f"model folder {folder} holds only a GGUF file, unpack it first: {command}")


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
