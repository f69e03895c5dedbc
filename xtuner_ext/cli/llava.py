"""LLaVA in XTuner's parts on the command line: what to load, and how its conversations were written in training."""

import dataclasses

from ..data.template_fit import detect_template
from ..data.templates import Template, get_template
from ..errors import UserError
from .loading import DTYPES


@dataclasses.dataclass(frozen=True)
class TemplateWithBos(Template):
    """A template that writes the beginning of a sequence itself.

    Attributes:
        bos (str): In front of a conversation, its system message included.
    """

    bos: str = ""

    def prompt(self, question, first=True, system=None):
        """str: As of :class:`~xtuner_ext.data.templates.Template`."""
        return (self.bos if first else "") + super().prompt(question, first, system)


def load_llava_model(args):
    """Load the LLaVA that arguments name in parts.

    Args:
        args (argparse.Namespace): Those of ``chat``.

    Returns:
        tuple[HybridVLForCausalLM, HybridVLProcessor]: On the GPU when there is one.
    """
    import torch

    from ..convert.llava_parts import load_llava

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Half precision is what the parts are stored in, and no faster on most CPUs.
    dtype = DTYPES[args.torch_dtype] if args.torch_dtype != "auto" else DTYPES["fp16" if device == "cuda" else "fp32"]
    model, processor = load_llava(
        args.model_name_or_path,
        args.llava,
        args.visual_encoder,
        args.visual_select_layer,
        dtype,
        args.trust_remote_code,
    )
    return model.to(device), processor


def llava_template(wanted, model, processor, folder):
    """The template that XTuner trained a LLaVA with, as it was written then.

    Args:
        wanted (str | None): Its name.
        model (HybridVLForCausalLM): The model.
        processor (HybridVLProcessor): Its processor.
        folder (str): Names the model in messages.

    Returns:
        Template: A conversation begins with the tokenizer's beginning of a sequence; the control words of a template
        need not be tokens of their own, as XTuner trains with any.

    Raises:
        UserError: When no template is known.
    """
    from xtuner.dataset.utils import get_bos_eos_token_ids

    tokenizer = processor.tokenizer
    name = wanted or model.config.template or detect_template(tokenizer)
    if name is None:
        raise UserError(f"{folder} names no conversation template: give the one of the training by --prompt-template")
    template = get_template(name)
    if not template.suffix:
        template = dataclasses.replace(template, suffix=tokenizer.eos_token or "")
    bos = get_bos_eos_token_ids(tokenizer)[0]
    if bos and tokenizer("a").input_ids[: len(bos)] != bos:
        # XTuner writes it also where the tokenizer would not.
        return TemplateWithBos(**vars(template), bos=tokenizer.decode(bos))
    return template
