"""Frozen linear layers in 4 or 8 bits, by bitsandbytes."""

import importlib.util

import torch
from torch import nn

from ..errors import UserError
from .parts import as_dict, linear_layers

# A head's worth of numbers: nothing is saved, and decays are sensitive.
KEPT = ("dt_proj", "share_proj")
DEFAULTS = {"bits": 4, "type": "nf4", "double_quant": True}


def quantise_language(llm, options):
    """Replace the frozen linear layers of the decoder, the head excepted, by quantised ones, in place.

    Args:
        llm (HybridVLForCausalLM): On any device.
        options (dict): ``bits`` (4 or 8) and, of 4 bits, ``type`` (``nf4`` or ``fp4``) and ``double_quant``.

    Returns:
        dict: The options with their defaults.

    Raises:
        UserError: For an unknown option, a missing package, or a decoder without frozen linear layers.
    """
    options = as_dict(options, "model.quantization")
    if unknown := sorted(set(options) - set(DEFAULTS)):
        raise UserError(f"unknown key model.quantization.{unknown[0]}, expected one of {', '.join(DEFAULTS)}")
    options = {**DEFAULTS, **options}
    if options["bits"] not in (4, 8):
        raise UserError(f"model.quantization.bits is {options['bits']!r}, expected 4 or 8")
    if options["type"] not in ("nf4", "fp4"):
        raise UserError(f"model.quantization.type is {options['type']!r}, expected 'nf4' or 'fp4'")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantization needs the package bitsandbytes, which is not installed")
    chosen = {
        name: linear
        for part in ("language", "mixers")
        for name, linear in linear_layers(llm, part).items()
        if not linear.weight.requires_grad and name.rpartition(".")[2] not in KEPT
    }
    if not chosen:
        raise UserError("model.quantization: the decoder has no frozen linear layer")
    make = _four_bits if options["bits"] == 4 else _eight_bits
    for name, linear in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(llm.get_submodule(parent), child, make(linear, options))
    # PEFT asks these before it puts an adapter beside a layer.
    llm.is_loaded_in_4bit, llm.is_loaded_in_8bit = options["bits"] == 4, options["bits"] == 8
    return options


def dequantise(llm):
    """Give every quantised layer's weight back as the numbers that it computes with, in place.

    Args:
        llm (nn.Module): After :func:`quantise_language`.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_bnb_weight

    for name, module in list(llm.named_modules()):
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
            with torch.device("meta"):
                linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(llm.get_submodule(parent), child, linear)
    llm.is_loaded_in_4bit = llm.is_loaded_in_8bit = False


def _four_bits(linear, options):
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, double = linear.weight, options["double_quant"]
    with torch.device("meta"):
        new = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=weight.dtype,
            compress_statistics=double,
            quant_type=options["type"],
        )
    new.weight = Params4bit(
        weight.data, requires_grad=False, compress_statistics=double, quant_type=options["type"], module=new
    )
    new.bias = linear.bias
    # Some processors have a form for inference that rounds the scales once more, for good, at the first evaluation.
    new.support_avx512bf16_for_cpu = False
    # Quantised by moving.
    return new.to(weight.device)


def _eight_bits(linear, options):
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    with torch.device("meta"):
        new = Linear8bitLt(
            linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False, threshold=6.0
        )
    new.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = linear.bias
    return new.to(linear.weight.device)
