"""Loading any model folder that this package knows, for the verbs that talk to models."""

import torch
from transformers.utils import logging

from ..convert.teacher import load_processor, load_teacher, resolve_folder, teacher_family
from ..data.template_fit import detect_template, fit_template
from ..errors import UserError
from ..modeling import HybridVLForCausalLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(folder, dtype="auto", device=None, trust_remote_code=False, adapter=None):
    """Load an exported student or a teacher of a known family.

    Args:
        folder (str): Model folder, or the name of a shipped model.
        dtype (str): ``auto`` (fp32 on a CPU, the folder's own on a GPU), ``fp32``, ``bf16`` or ``fp16``.
        device (str, optional): ``cpu`` or ``cuda``; a GPU when there is one.
        trust_remote_code (bool): Run the folder's own tokenizer code.
        adapter (str, optional): Folder of an adapter, which is merged in memory.

    Returns:
        tuple[HybridVLForCausalLM, HybridVLProcessor]: Ready to generate.

    Raises:
        UserError: For a folder that is missing, incomplete or of another kind, or another model's adapter.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto" and device == "cpu":
        # Most CPUs multiply bf16 matrices no faster, and answers then equal the training model's.
        dtype = "fp32"
    torch_dtype = DTYPES.get(dtype)
    path = resolve_folder(folder)
    if teacher_family(path) is None:
        try:
            logging.disable_progress_bar()
            model = HybridVLForCausalLM.from_pretrained(path, dtype=torch_dtype or "auto")
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} does not load: {str(error).splitlines()[0]}") from error
    else:
        model = load_teacher(path, torch_dtype)
    if adapter is not None:
        model = _with_adapter(model, path, adapter)
    return model.to(device).eval(), load_processor(path, trust_remote_code=trust_remote_code)


def _with_adapter(model, folder, adapter):
    # PEFT takes seconds to import.
    from ..convert.merge import attach, check_base, read_adapter

    config, state, facts = read_adapter(adapter)
    check_base(model, folder, adapter, facts)
    return attach(model, config, state, adapter).merge_and_unload()


def choose_template(wanted, model, processor, folder):
    """The conversation template for a model: the one asked for, the model's own, or its tokenizer's.

    Args:
        wanted (str | None): Name given by the user.
        model (HybridVLForCausalLM): The model.
        processor (HybridVLProcessor): Its processor.
        folder (str): Names the model in messages.

    Returns:
        tuple[str, Template]: Its name and the template, ready for the tokenizer.

    Raises:
        UserError: When no template is known, or the tokenizer does not fit it.
    """
    name = wanted or model.config.template or detect_template(processor.tokenizer)
    if name is None:
        raise UserError(
            f"{folder} names no conversation template and its tokenizer's chat template is none that is known: "
            "choose one with --prompt-template"
        )
    return name, fit_template(name, processor.tokenizer)


def count_parameters(model):
    """int: Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
