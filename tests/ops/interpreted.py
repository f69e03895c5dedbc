"""Prints, as JSON, how far kernels that Triton interprets on a CPU are from the torch twins.

    TRITON_INTERPRET=1 python -m tests.ops.interpreted KERNEL

KERNEL is one of the keys of ``CASES``. Only fp32 is compared: the interpreter multiplies bf16 as if it were integers.
"""

import builtins
import contextlib
import json
import sys
from types import SimpleNamespace

import torch

from xtuner_ext.ops import causal_conv_kernels, causal_conv_step_triton, ssd_kernels, ssd_step_triton
from xtuner_ext.ops.choice import difference

# ``xtuner_ext.ops`` names functions after some of its modules.
causal_conv, causal_conv_step, ssd, ssd_step = (
    sys.modules[f"xtuner_ext.ops.{name}"] for name in ("causal_conv", "causal_conv_step", "ssd", "ssd_step")
)

CASES = {
    "step": (ssd_step, ssd_step._torch_step, ssd_step_triton.triton_step, [(8, 16), (5, 12)]),
    "convolution step": (
        causal_conv_step,
        causal_conv_step._torch_step,
        causal_conv_step_triton.triton_conv_step,
        [(2, True), (4, True), (3, False)],
    ),
    "mamba_ssm": (ssd, ssd.torch_ssd, ssd_kernels.triton_ssd, [(16, 16, True), (16, 16, False)]),
    "fla": (ssd, ssd.torch_ssd, ssd_kernels.fla_ssd, [(16, 16, True), (16, 16, False)]),
    "fla convolution": (
        causal_conv,
        causal_conv.torch_conv,
        causal_conv_kernels.fla_conv,
        [(4, True, True, True, True), (2, True, False, True, True), (3, False, True, False, True)],
    ),
}


def make_interpretable():
    """Give the kernels what they ask of a GPU, and take the first of their tuned settings untried."""
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *args, config, **meta: [1.0, 1.0, 1.0]
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=4)


def count_with_tensors(module):
    """Let a kernel's ``range`` give Triton's integers, which the interpreter leaves Python's."""
    language = module.tl
    module.range = lambda *bounds: (language.full((), i, language.int32) for i in builtins.range(*bounds))


def main(name):
    """Print the differences of one kernel by output and gradient."""
    make_interpretable()
    if name == "fla":
        import fla.ops.simple_gla  # noqa: F401
        from fla.ops.common import chunk_h

        count_with_tensors(chunk_h)
    module, twin, kernel, kinds = CASES[name]
    differences = {}
    for kind in kinds:
        expected, found = (module._probe(call, torch.device("cpu"), torch.float32, kind) for call in (twin, kernel))
        differences.update({f"{what} at {kind}": difference(found[what], expected[what]) for what in expected})
    print(json.dumps(differences))


if __name__ == "__main__":
    main(sys.argv[1])
