"""Handing one stage's checkpoint to the next."""

import hashlib
import json
import os
from pathlib import Path

import torch

from ..compat import allow_checkpoint_types
from ..errors import UserError


def describe(model):
    """What a checkpoint says of the run that made it.

    Args:
        model (DistillModel): The model in training.

    Returns:
        dict: Stage, layer types, mixer and teacher shape.
    """
    config = model.student_config
    return {
        "stage": model.stage,
        "trainable": model.trainable,
        "layer_types": list(config.layer_types),
        "mixer": dict(config.mixer),
        "teacher": {**teacher_shape(config), "fingerprint": model.teacher_fingerprint},
    }


def fingerprint(teacher):
    """A few of a teacher's weights as text, the same in whatever dtype it was loaded.

    Args:
        teacher (HybridVLForCausalLM): Before any training.

    Returns:
        str | None: None for a model without values.
    """
    weight = teacher.lm_head.weight
    if weight.is_meta:
        return None
    sample = weight.detach()[:: max(1, len(weight) // 64), :16].to(torch.bfloat16).cpu().contiguous()
    return hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def teacher_shape(config):
    """dict: The numbers in which two teachers must agree to share a checkpoint."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return {key: getattr(config, key) for key in keys}


def find_previous_checkpoint(work_dir, previous_stage):
    """Find the newest checkpoint of the stage before, beside this stage's work_dir.

    Args:
        work_dir (str): This stage's folder, such as ``work_dirs/digits/stage2``.
        previous_stage (str): The earlier stage's folder name, such as ``stage1``.

    Returns:
        str: Path of the checkpoint.

    Raises:
        UserError: When there is none.
    """
    folder = Path(work_dir).parent / previous_stage
    pointer = folder / "last_checkpoint"
    if not pointer.is_file():
        raise UserError(
            f"{pointer} does not exist: train {previous_stage} first, or give its checkpoint with "
            f"--cfg-options model.pretrained_pth=PATH, or start without it with previous_stage=None"
        )
    path = pointer.read_text().strip()
    # A run may have been moved since the pointer was written.
    for candidate in (path, folder / os.path.basename(path)):
        if os.path.exists(candidate):
            return str(candidate)
    raise UserError(f"{pointer} names {path}, which does not exist")


def read_checkpoint(path):
    """Read a training checkpoint.

    Args:
        path (str): ``.pth`` file, or a folder that DeepSpeed wrote.

    Returns:
        tuple[dict, dict]: Weights, and what the run said of itself (empty for DeepSpeed's folders).

    Raises:
        UserError: For a file that is missing, damaged or no training checkpoint.
    """
    if os.path.isdir(path):
        try:
            from xtuner.utils.zero_to_any_dtype import get_state_dict_from_zero_checkpoint
        except ImportError as error:
            raise UserError(f"checkpoint {path} is DeepSpeed's, whose package is needed to read it") from error
        folder, name = os.path.split(os.path.abspath(path))
        # XTuner's own reader rounds to fp16.
        return get_state_dict_from_zero_checkpoint(folder, name, dtype=torch.float32), {}
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path} does not exist")
    allow_checkpoint_types()
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises half a dozen types for a damaged or forbidden file, some without words.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"checkpoint {path} holds no 'state_dict', expected a checkpoint of tools/dist.sh train")
    return checkpoint["state_dict"], checkpoint.get("meta", {}).get("distill") or {}


def load_previous_stage(model, path):
    """Load the stage before into a model and insist that it fits.

    Args:
        model (DistillModel): Receives the weights.
        path (str): Checkpoint.

    Raises:
        UserError: For the wrong stage, teacher or mixer, or weights that are missing or unknown.
    """
    state, found = read_checkpoint(path)
    ours = model.describe()
    if found:
        if found["stage"] != ours["stage"] - 1:
            expected = f"one of stage {ours['stage'] - 1}" if ours["stage"] > 1 else "none"
            raise UserError(f"checkpoint {path} comes from stage {found['stage']}, stage {ours['stage']} starts from {expected}")
        for key in ("teacher", "mixer"):
            if found[key] != ours[key]:
                different = {k: (found[key].get(k), v) for k, v in ours[key].items() if found[key].get(k) != v}
                raise UserError(f"checkpoint {path} was trained with another {key}: {json.dumps(different)} (found, expected)")
    elif not any(".mixer.mamba." in key for key in state):
        raise UserError(f"checkpoint {path} has no distilled mixer, expected one of stage {ours['stage'] - 1}")
    expected = model.state_dict()
    kept = [i for i, word in enumerate(ours["layer_types"]) if word == "full_attention"]
    # A hybrid keeps attention where stages 1 and 2 trained a mixer; those weights are left behind.
    behind = tuple(f"llm.model.layers.{i}.mixer.mamba." for i in kept)
    state = {key: value for key, value in state.items() if not key.startswith(behind)} if behind else state
    if unknown := sorted(set(state) - set(expected)):
        raise UserError(f"checkpoint {path} has {len(unknown)} weights that stage {ours['stage']} does not, first {unknown[0]}")
    new = [key for key in expected if ".mixer.mamba." in key and ("A_log" in key or "dt_bias" in key)]
    if missing := sorted(set(new) - set(state)):
        raise UserError(f"checkpoint {path} misses {len(missing)} weights, the first is {missing[0]}")
    with torch.no_grad():
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for key, value in state.items():
            if parameters[key].shape != value.shape:
                raise UserError(
                    f"checkpoint {path}: {key} has shape {tuple(value.shape)}, expected {tuple(parameters[key].shape)}"
                )
            parameters[key].copy_(value)
