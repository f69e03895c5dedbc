"""Merging a PEFT adapter into its base model, checked by the logits of both.

A base that this package can load becomes a complete folder of ours, or one in its own layout; any other model of
transformers keeps its own class.
"""

import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError
from ..modeling import HybridVLForCausalLM
from .checkpoint import find_dtype, read_json, read_state, weight_files, whole_folder
from .export import PARITY_TOLERANCE, check_parity, probe_logits, relative_difference, write_model
from .llama import ATTENTION, MIXER
from .teacher import load_processor, load_teacher, read_model_config, remote_hint, resolve_folder

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# What our own adapters say of the model that they belong to.
BASE_FILE = "base_model.json"
# Share of the largest logit by which adding an adapter's product to a weight may differ from computing both, in fp32.
MERGE_TOLERANCE = 1e-4
RECIPE_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "target_modules", "modules_to_save")
LAYOUTS = ("hybrid_vl", "original")


def read_adapter(folder):
    """Read a PEFT adapter.

    Args:
        folder (str | Path): With adapter_config.json and adapter_model.safetensors (or .bin).

    Returns:
        tuple[peft.LoraConfig, dict[str, Tensor], dict]: Configuration, weights, and what ``base_model.json`` says of
        the base, empty where the file is missing.

    Raises:
        UserError: For a folder that holds no LoRA adapter, or an empty one.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE}, expected the folder of an adapter")
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {raw.get('peft_type')!r}, only LORA can be merged")
    ranks = [raw.get("r"), *(raw.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise UserError(f"{path}: the ranks are {ranks}, expected at least 1: there is nothing to merge")
    config = PeftConfig.from_pretrained(str(folder))
    state = _adapter_weights(folder)
    if not any(".lora_" in key for key in state):
        raise UserError(f"{folder} holds no LoRA weight: there is nothing to merge")
    facts = read_json(folder / BASE_FILE) if (folder / BASE_FILE).is_file() else {}
    return config, state, facts


def _adapter_weights(folder):
    path = folder / WEIGHTS_FILE
    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    path = folder / "adapter_model.bin"
    if not path.is_file():
        raise UserError(f"{folder} has neither {WEIGHTS_FILE} nor adapter_model.bin")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file.
        raise UserError(f"{path} is not a readable file of weights: {type(error).__name__}") from error


def attach(model, config, state, where):
    """Put an adapter beside a model's layers, and insist that it was made for such a model.

    Args:
        model (PreTrainedModel): The base; changed in place.
        config (peft.LoraConfig): Of the adapter.
        state (dict[str, Tensor]): Weights of the adapter.
        where (str | Path): Names the adapter in messages.

    Returns:
        peft.PeftModel: In evaluation mode.

    Raises:
        UserError: When the model lacks a layer that the adapter has, or has it in another shape.
    """
    # No task: its wrapper would ask more of the model than layers.
    config.inference_mode, config.task_type = True, None
    if isinstance(model, HybridVLForCausalLM):
        # Llama and Qwen2 have the other name in their own classes, which adapters of theirs are written for.
        rename_targets(config, ATTENTION, MIXER)
        state = {key.replace(ATTENTION, MIXER): value for key, value in state.items()}
    # Else PEFT warns that the base has changed its name.
    model.name_or_path = config.base_model_name_or_path
    try:
        tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"adapter {where} belongs to another model: {str(error).splitlines()[0]}") from error
    # Else PEFT would look for the base's vocabulary in a config.json that it may not understand.
    expected = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    expected = {key: tuple(value.shape) for key, value in expected.items()}
    missing, surplus = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or surplus:
        what = f"misses {missing[0]}" if missing else f"has {surplus[0]}, which the base model has no layer for"
        raise UserError(f"adapter {where} belongs to another model: it {what}")
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise UserError(
                f"adapter {where} belongs to another model: {key} has shape {tuple(state[key].shape)}, expected {shape}"
            )
    set_peft_model_state_dict(tuned, state)
    return tuned.eval()


def rename_targets(config, old=None, new=None):
    """Replace a part of the layers' names in a PEFT configuration, in place."""
    if old is not None:
        for field in ("target_modules", "modules_to_save"):
            names = getattr(config, field)
            if not isinstance(names, (str, type(None))):
                setattr(config, field, type(names)(f".{name}.".replace(old, new)[1:-1] for name in names))


def merge_weights(model, config, state, where, probe):
    """Add an adapter to a model's weights.

    Args:
        model (PreTrainedModel): The base in fp32; changed in place.
        config (peft.LoraConfig): Of the adapter.
        state (dict[str, Tensor]): Weights of the adapter.
        where (str | Path): Names the adapter in messages.
        probe (callable): Model to tensor, what is compared before and after.

    Returns:
        tuple[PreTrainedModel, float]: The model itself, without adapters, and the largest difference of its
        logits to those with the adapter beside it, as a share of the largest.

    Raises:
        UserError: When the adapter belongs to another model, or the merged model gives other logits.
    """
    keys, tied = set(model.state_dict()), getattr(model.config, "tie_word_embeddings", False)
    tuned = attach(model, config, state, where)
    expected = probe(tuned.base_model.model)
    merged = tuned.merge_and_unload()
    if set(merged.state_dict()) != keys:
        wrong = sorted(set(merged.state_dict()) ^ keys)
        raise UserError(f"merging {where} left other weights than the base model's, first {wrong[0]}")
    merged.requires_grad_(False)
    # A head that is the embedding was saved once for each, and PEFT parts them.
    if tied:
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    difference = relative_difference(expected, probe(merged))
    check_parity("the merged model", difference, MERGE_TOLERANCE, where)
    return merged, difference


def merge_adapter(
    adapter, out, base=None, layout="hybrid_vl", dequantise=False, dtype=None, max_shard_size="5GB",
    trust_remote_code=False,
):
    """Merge an adapter into a base that this package loads, and write the result.

    An adapter that was trained beside quantised layers is merged into the base's full-precision weights; with
    ``dequantise``, into the numbers that those layers computed with, so that the result is the trained model.

    Args:
        adapter (str | Path): Folder of the adapter.
        out (str | Path): Folder to write; appears only when all checks pass.
        base (str, optional): Folder of the base; the one that the adapter names when absent.
        layout (str): ``hybrid_vl``, or ``original`` for the files and names of the base's own family.
        dequantise (bool): See above.
        dtype (str, optional): Of the stored weights; the base's own when absent.
        max_shard_size (str): Largest weight file.
        trust_remote_code (bool): Run the base folder's own tokenizer code.

    Returns:
        dict: ``base``, ``difference`` and, of the stored weights, ``dtype``.

    Raises:
        UserError: For an adapter that is empty or another model's, or a model that fails a check.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout is {layout}, expected one of {', '.join(LAYOUTS)}")
    config, state, facts = read_adapter(adapter)
    if base is None:
        base = config.base_model_name_or_path
        if not base or not resolve_folder(base).is_dir():
            found = f"names {base}, which does not exist," if base else "names nothing"
            raise UserError(f"{Path(adapter) / CONFIG_FILE} {found} as its base model: give the folder with --base")
    refuse_inputs(out, resolve_folder(base), adapter)
    model = load_teacher(base, attn_implementation="sdpa")
    check_base(model, base, adapter, facts)
    stored = find_dtype(dtype) if dtype else model.lm_head.weight.dtype
    if dequantise:
        _requantise(model, facts, adapter)
    merged, difference = merge_weights(model.float(), config, state, adapter, probe_logits)
    if layout == "original":
        write_original(merged, base, out, None if dtype is None else stored, max_shard_size)
    else:
        processor = load_processor(base, trust_remote_code=trust_remote_code)
        raw = read_json(Path(adapter) / CONFIG_FILE)
        recipe = {"kind": "supervised", "adapter": {key: raw.get(key) for key in RECIPE_KEYS}}
        write_model(merged, processor, out, base, stored, max_shard_size, recipe)
    return {"base": str(base), "difference": difference, "dtype": str(stored).removeprefix("torch.")}


def refuse_inputs(out, *inputs):
    """Raise UserError when writing a folder would remove one that is read."""
    target = Path(out).resolve()
    for folder in inputs:
        if target in (Path(folder).resolve(), *Path(folder).resolve().parents):
            raise UserError(f"writing {out} would remove {folder}, which is merged: choose another folder")


def check_base(model, base, adapter, facts):
    """Raise UserError when an adapter's folder says that it was trained beside other weights."""
    from ..distill.teacher_cache import weights_digest

    if facts.get("weights_digest") not in (None, weights_digest(model)):
        raise UserError(
            f"adapter {adapter} was trained beside other weights than those of {base}: "
            f"its base model was {facts.get('base_model')}"
        )


def _requantise(model, facts, adapter):
    from ..finetune.quantization import dequantise, quantise_language

    if not facts.get("quantization"):
        raise UserError(f"adapter {adapter} was not trained beside quantised layers: there is nothing to dequantise")
    model.requires_grad_(False)
    quantise_language(model, facts["quantization"])
    dequantise(model)


def write_original(model, base, out, dtype=None, max_shard_size="5GB"):
    """Write a model in the layout of the family that its base belongs to.

    Every other file of the base is copied: configuration, tokenizer and the family's own code.

    Args:
        model (HybridVLForCausalLM): With the base's structure.
        base (str): Folder of the base.
        out (str | Path): Folder to write; appears only when it gives the model's logits.
        dtype (torch.dtype, optional): Of the stored weights; those of the base when absent.
        max_shard_size (str): Largest weight file.

    Raises:
        UserError: For a base in our own layout, a weight that lies in another folder, or logits that differ.
    """
    folder = resolve_folder(base)
    family, config = read_model_config(folder)
    if family is None:
        raise UserError(f"{base} is in the hybrid_vl layout, which is the default one: leave --layout original out")
    before = read_state(folder)
    after = family.to_checkpoint(config, model.state_dict())
    if surplus := sorted(set(after) - set(before)):
        raise UserError(
            f"{base} does not hold {surplus[0]}, which lies in another folder: merge without --layout original"
        )
    # What no forward pass reads is kept as it was.
    state = {key: after.get(key, value).to(dtype or value.dtype).contiguous() for key, value in before.items()}
    weights = {path.name for path in weight_files(folder)}
    with whole_folder(out) as work:
        for path in folder.iterdir():
            if path.is_file() and path.name not in weights and not path.name.endswith(".index.json"):
                shutil.copyfile(path, work / path.name)
        save_torch_state_dict(state, work, max_shard_size=max_shard_size)
        written = load_teacher(work, torch.float32, "sdpa")
        rounded = model.to(dtype or before[next(iter(after))].dtype).float()
        difference = relative_difference(probe_logits(rounded), probe_logits(written))
        check_parity("the written model", difference, PARITY_TOLERANCE, out)


def merge_transformers(model_class, base, adapter, out, write_processor, probe, max_shard_size="5GB", **options):
    """Merge an adapter into a model of transformers' own classes, and write it as such.

    Args:
        model_class (type): Such as ``AutoModelForCausalLM`` or ``CLIPVisionModel``.
        base (str): Folder of the base.
        adapter (str): Folder of the adapter.
        out (str | Path): Folder to write; appears only when all checks pass.
        write_processor (callable): Folder to None, writes what belongs beside the weights.
        probe (callable): Model to tensor, what is compared before and after.
        max_shard_size (str): Largest weight file.
        **options: As ``from_pretrained`` takes them.

    Returns:
        dict: As :func:`merge_adapter`.

    Raises:
        UserError: For a base that does not load, an adapter that is empty or another model's, or a failed check.
    """
    config, state, _ = read_adapter(adapter)
    refuse_inputs(out, base, adapter)
    try:
        model, info = model_class.from_pretrained(base, dtype="auto", output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        hint = remote_hint(options.get("trust_remote_code", True))
        raise UserError(f"{base} does not load: {str(error).splitlines()[0]}{hint}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{base} does not hold the weights of a {type(model).__name__}, the first is {missing[0]}")
    dtype = model.dtype
    merged, difference = merge_weights(model.float().eval(), config, state, adapter, probe)
    for parameter in merged.parameters():
        # Not the model: its rotary frequencies are computed, not stored, and stay fp32.
        parameter.data = parameter.data.to(dtype)
    with whole_folder(out) as folder:
        merged.save_pretrained(folder, max_shard_size=max_shard_size)
        write_processor(folder)
        written = model_class.from_pretrained(folder, dtype="auto", **options).eval()
        check_parity("the written model", relative_difference(probe(merged), probe(written)), PARITY_TOLERANCE, out)
    return {"base": str(base), "difference": difference, "dtype": str(dtype).removeprefix("torch.")}
