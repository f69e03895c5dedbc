"""State-space duality (Mamba-2) scan.

Axis letters: B batch, L length, H heads, G groups, P head width, N state width, Q chunk length.

Per head the operation is, with ``delta_t = softplus(dt_t + dt_bias)``,

    S_t = exp(delta_t * A) S_{t-1} + delta_t x_t B_t^T        S in R^{P x N}
    y_t = S_t C_t

(Dao & Gu, "Transformers are SSMs", 2024, section 6). A token whose ``dt`` is ``-inf`` has
``delta = 0``: it leaves the state untouched, which is how padding is expressed.
"""

import torch

from .choice import Backends, Kernel, recording, run_detached, up_to
from .segments import number_segments
from .ssd_kernels import fla_ssd, native_ssd, triton_ssd
from .ssd_torch import torch_ssd

# Widest heads and states that one block of our kernels holds, and rows times heads that a CUDA grid does.
NATIVE_WIDTH = 128
NATIVE_ROWS = 2**16 - 1


def ssd(
    x,
    dt,
    A,
    B,
    C,
    *,
    dt_bias=None,
    chunk_size=64,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    backend="auto",
):
    """Run the chunked SSD scan over a sequence.

    Args:
        x (Tensor): Inputs, (B, L, H, P).
        dt (Tensor): Time steps before bias and softplus, (B, L, H). ``-inf`` skips a token.
        A (Tensor): Negative decay rates in fp32, (H,).
        B (Tensor): Input projections, (B, L, G, N) with G dividing H; brought to x's dtype, as is C.
        C (Tensor): Output projections, (B, L, G', N) with G' dividing H.
        dt_bias (Tensor, optional): Added to ``dt`` before softplus, (H,).
        chunk_size (int): Tokens handled by one dense block, Q.
        segment_ids (Tensor, optional): Integers (B, L); the state restarts where they change.
        initial_state (Tensor, optional): State before the first token, (B, H, P, N). It belongs to
            the segment of the first token.
        return_final_state (bool): Also return the state after the last token, in fp32.
        backend (str): ``torch``, ``native`` (our own Triton kernels), ``triton`` (mamba-ssm), ``fla``
            (flash-linear-attention), ``tune`` or ``auto``: on CUDA the first of these kernels that is installed and
            agrees with torch, with ``tune`` the fastest such, timed once for every size of call; elsewhere torch. The
            environment variable XTUNER_EXT_SSD_BACKEND says what ``auto`` is.

    Returns:
        Tensor | tuple[Tensor, Tensor]: y of x's shape and dtype; with ``return_final_state`` also the
        final state (B, H, P, N) in fp32.

    Raises:
        ValueError: For shapes that do not fit together, an unknown backend, or a named backend that
            cannot do what is asked.
        RuntimeError: For a named backend that does not agree with torch on this machine.
    """
    _check_shapes(x, dt, A, B, C, dt_bias, segment_ids, initial_state)
    if segment_ids is not None:
        segment_ids = number_segments(segment_ids)
    # Under mixed precision norms and fp32 angles promote them, and kernels multiply one dtype with itself.
    B, C = B.to(x.dtype), C.to(x.dtype)
    tensors = dict(x=x, dt=dt, A=A, B=B, C=C, dt_bias=dt_bias, initial_state=initial_state)
    options = dict(chunk_size=chunk_size, segment_ids=segment_ids)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    refusals = {}
    if max(x.shape[3], B.shape[3]) > NATIVE_WIDTH:
        refusals["native"] = f"has heads and states of up to {NATIVE_WIDTH}, not {x.shape[3]} x {B.shape[3]}"
    if x.shape[0] * x.shape[2] > NATIVE_ROWS:
        refusals["native"] = f"takes up to {NATIVE_ROWS} rows times heads, not {x.shape[0]} x {x.shape[2]}"
    if segment_ids is not None and recording(x.device):
        refusals["fla"] = "counts the segments of packed rows, which cannot be recorded in a graph"
    call = SSD.choose(
        backend,
        x,
        (x.shape[3], B.shape[3], trains),
        _case(x, B, C, trains, segment_ids),
        refusals,
        lambda implementation: run_detached(implementation, tensors, options, trains),
    )
    y, state = call(**tensors, **options)
    return (y, state) if return_final_state else y


def _case(x, B, C, trains, segment_ids):
    words = f"{x.shape[0]} x {up_to(x.shape[1])} tokens, {x.shape[2]} heads of {x.shape[3]} x {B.shape[3]}"
    words += f" in {B.shape[2]} and {C.shape[2]} groups"
    return words + (", packed" if segment_ids is not None else "") + (", with gradients" if trains else "")


def _probe(implementation, device, dtype, kind):
    """dict[str, Tensor]: Outputs, and where it trains gradients, of a scan of 256 tokens in segments from a state."""
    width, state_width, trains = kind
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    tensors = dict(
        x=normal(2, 128, 2, width).to(dtype),
        dt=normal(2, 128, 2),
        A=-torch.tensor([0.2, 1.0]),
        B=normal(2, 128, 1, state_width).to(dtype) / state_width**0.5,
        C=normal(2, 128, 2, state_width).to(dtype),
        dt_bias=normal(2) - 2,
        initial_state=normal(2, 2, width, state_width),
    )
    tensors = {name: t.to(device).requires_grad_(trains) for name, t in tensors.items()}
    ids = torch.tensor([[0] * 40 + [1] * 3 + [2] * 85, [0] * 100 + [1] * 28], device=device)
    y, state = implementation(**tensors, chunk_size=64, segment_ids=ids)
    if not trains:
        return {"y": y, "final state": state}
    loss = sum((t.float() * normal(*t.shape).to(device)).sum() for t in (y, state))
    names = [f"gradient of {name}" for name in tensors]
    return {"y": y, "final state": state, **dict(zip(names, torch.autograd.grad(loss, list(tensors.values()))))}


KERNELS = {
    "native": Kernel(native_ssd, "triton", "triton"),
    "triton": Kernel(triton_ssd, "mamba-ssm", "mamba_ssm"),
    "fla": Kernel(fla_ssd, "flash-linear-attention", "fla"),
}
SSD = Backends("ssd", torch_ssd, KERNELS, _probe, "XTUNER_EXT_SSD_BACKEND")


def _check_shapes(x, dt, A, B, C, dt_bias, segment_ids, initial_state):
    if x.ndim != 4:
        raise ValueError(f"ssd: x has shape {tuple(x.shape)}, expected (B, L, H, P)")
    batch, length, heads, width = x.shape
    expected = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "dt_bias": (dt_bias, (heads,)),
        "segment_ids": (segment_ids, (batch, length)),
        "initial_state": (initial_state, (batch, heads, width, B.shape[-1])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"ssd: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    for name, tensor in (("B", B), ("C", C)):
        if tensor.shape[:2] != (batch, length) or tensor.ndim != 4 or heads % tensor.shape[2]:
            raise ValueError(
                f"ssd: {name} has shape {tuple(tensor.shape)}, expected ({batch}, {length}, G, N) "
                f"with G dividing {heads} heads"
            )
    if B.shape[-1] != C.shape[-1]:
        raise ValueError(f"ssd: C has {C.shape[-1]} state channels, B has {B.shape[-1]}")
