"""LoRA on several parts of a model through one PEFT configuration, and adapters in PEFT's own format."""

import copy
import json
from pathlib import Path

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from ..convert.merge import BASE_FILE, WEIGHTS_FILE, rename_targets
from ..errors import UserError
from .parts import LORA_PARTS, as_dict, linear_layers

ADAPTER = "default"
PEFT_PREFIX = "base_model.model."
# What a PEFT checkpoint's key has where a module keeps the adapter's name.
INNER = f".{ADAPTER}."


def lora_config(llm, lora, base=""):
    """Translate a config's ``lora`` to PEFT's.

    Args:
        llm (HybridVLForCausalLM): The model.
        lora (dict): For each part of ``LORA_PARTS`` to tune ``dict(r=16, alpha=32, targets=["q_proj", "v_proj"])``, of
            which alpha is twice the rank and targets are all linear layers of the part when absent; ``dropout``
            (0.05 when absent) is for all parts.
        base (str): Folder of the model, which an adapter names.

    Returns:
        peft.LoraConfig: One for all parts.

    Raises:
        UserError: For an unknown key, a part without linear layers, an unknown target or a rank below 1.
    """
    lora = as_dict(lora, "model.lora")
    dropout = lora.pop("dropout", 0.05)
    if unknown := sorted(set(lora) - set(LORA_PARTS)):
        raise UserError(f"unknown key model.lora.{unknown[0]}, expected one of {', '.join(LORA_PARTS)}, dropout")
    if not lora:
        raise UserError(f"model.lora names no part, expected one of {', '.join(LORA_PARTS)}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"model.lora.dropout is {dropout!r}, expected at least 0 and less than 1")
    targets, first, ranks, alphas = [], None, {}, {}
    # In this order, so that no pattern is for the language part, whose layers hold the mixers.
    for part in [part for part in LORA_PARTS if part in lora]:
        rank, alpha, names = _part_options(llm, part, as_dict(lora[part], f"model.lora.{part}"))
        targets += names
        first = first or (rank, alpha)
        pattern = _pattern(llm, part)
        if rank != first[0]:
            ranks[pattern] = rank
        if alpha != first[1]:
            alphas[pattern] = alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        r=first[0],
        lora_alpha=first[1],
        lora_dropout=dropout,
        target_modules=sorted(targets),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def _pattern(llm, part):
    if part != "mixers":
        return r"vision\.projector\..*" if part == "projector" else r"vision\.(?!projector\.).*"
    layers = [str(index) for index, word in enumerate(llm.config.layer_types) if word == "linear_attention"]
    return rf"model\.layers\.({'|'.join(layers)})\.mixer\..*"


def _part_options(llm, part, options):
    where = f"model.lora.{part}"
    if unknown := sorted(set(options) - {"r", "alpha", "targets"}):
        raise UserError(f"unknown key {where}.{unknown[0]}, expected r, alpha or targets")
    rank = options.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{where}.r is {rank!r}, expected a rank of at least 1")
    alpha = 2 * rank if options.get("alpha") is None else options["alpha"]
    if not isinstance(alpha, (int, float)) or alpha <= 0:
        raise UserError(f"{where}.alpha is {alpha!r}, expected a number above 0")
    linears = linear_layers(llm, part)
    if not linears:
        raise UserError(f"{where}: the model has no linear layer there")
    kinds = {name.rpartition(".")[2] for name in linears}
    chosen = set(options.get("targets") or kinds)
    if unknown := sorted(chosen - kinds):
        raise UserError(f"{where}.targets names {unknown[0]!r}, expected some of {', '.join(sorted(kinds))}")
    return rank, alpha, [name for name in linears if name.rpartition(".")[2] in chosen]


def add_lora(llm, config):
    """Put adapters beside the targeted layers, in place; names of other weights stay as they are.

    Args:
        llm (HybridVLForCausalLM): Its targeted layers must be frozen.
        config (peft.LoraConfig): From :func:`lora_config`.

    Raises:
        UserError: When a layer would train both as a whole and by its adapter.
    """
    modules = dict(llm.named_modules())
    for name in config.target_modules:
        if modules[name].weight.requires_grad:
            raise UserError(f"model.lora tunes {name}, which model.freeze leaves to train as a whole: choose one")
    # PEFT shortens the list of targets in its configuration where shorter names mean the same.
    trained = [parameter for parameter in llm.parameters() if parameter.requires_grad]
    inject_adapter_in_model(config, llm, adapter_name=ADAPTER)
    # It freezes all that is no adapter's.
    for parameter in trained:
        parameter.requires_grad_(True)


def has_lora(llm):
    """bool: Whether a model has adapters beside its layers."""
    return any(isinstance(module, LoraLayer) for module in llm.modules())


def saved_modules(llm):
    """Modules that train as a whole beside the adapters.

    Args:
        llm (HybridVLForCausalLM): With adapters.

    Returns:
        list[str]: Names, none of them inside of another; together they hold every trained weight that is no adapter's.

    Raises:
        UserError: When a module that must be saved as a whole has an adapter inside.
    """
    found = []

    def visit(module, name):
        own = any(p.requires_grad for p in module.parameters(recurse=False))
        # PEFT can wrap no list of modules.
        whole = name and not isinstance(module, (nn.ModuleList, LoraLayer)) and not has_lora(module)
        if own and not whole:
            raise UserError(
                f"{name or 'the model'} trains in part and has adapters inside, which no adapter file can hold"
            )
        parameters = list(module.parameters())
        if own or (whole and parameters and all(p.requires_grad for p in parameters)):
            found.append(name)
            return
        for child, inner in module.named_children():
            if not isinstance(inner, LoraLayer):
                visit(inner, f"{name}.{child}" if name else child)

    visit(llm, "")
    return found


def write_adapter(llm, config, folder, facts, names=()):
    """Write the trained weights as a PEFT adapter.

    Args:
        llm (HybridVLForCausalLM): Trained.
        config (peft.LoraConfig): That :func:`add_lora` used.
        folder (Path): Existing folder to write into.
        facts (dict): What tells the base model from others; :func:`~xtuner_ext.convert.merge.read_adapter` reads it.
        names (tuple[str, str], optional): A part of our layers' names and what the base's own class has in its place.
    """
    saved = saved_modules(llm)
    config = copy.deepcopy(config)
    config.modules_to_save, config.inference_mode = saved or None, True
    rename_targets(config, *names)
    config.save_pretrained(folder)
    state = {}
    for name, tensor in llm.state_dict().items():
        if INNER in name and ".lora_" in name:
            state[PEFT_PREFIX + name.replace(INNER, ".")] = tensor
        elif name.startswith(tuple(f"{module}." for module in saved)):
            state[PEFT_PREFIX + name] = tensor
    state = {name.replace(*names) if names else name: tensor for name, tensor in state.items()}
    save_file({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, Path(folder) / WEIGHTS_FILE)
    (Path(folder) / BASE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
