"""State-space duality (Mamba-2) scan.

Axis letters: B batch, L length, H heads, G groups, P head width, N state width, Q chunk length.

Per head the operation is, with ``delta_t = softplus(dt_t + dt_bias)``,

    S_t = exp(delta_t * A) S_{t-1} + delta_t x_t B_t^T        S in R^{P x N}
    y_t = S_t C_t

(Dao & Gu, "Transformers are SSMs", 2024, section 6). A token whose ``dt`` is ``-inf`` has
``delta = 0``: it leaves the state untouched, which is how padding is expressed.
"""

import functools
import importlib
import importlib.util
import logging

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

# Largest number of elements that 32-bit pointer arithmetic of the Triton kernels can address.
INT32_ELEMENTS = 2**31

BACKENDS = ("auto", "torch", "triton", "fla")


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
        backend (str): ``auto``, ``torch``, ``triton`` (mamba-ssm) or ``fla`` (flash-linear-attention).

    Returns:
        Tensor | tuple[Tensor, Tensor]: y of x's shape and dtype; with ``return_final_state`` also the
        final state (B, H, P, N) in fp32.

    Raises:
        ValueError: For shapes that do not fit together, an unknown backend, or a named backend that
            cannot do what is asked.
    """
    _check_shapes(x, dt, A, B, C, dt_bias, segment_ids, initial_state)
    if segment_ids is not None:
        segment_ids = number_segments(segment_ids)
    # Under mixed precision norms and fp32 angles promote them, and kernels multiply one dtype with itself.
    B, C = B.to(x.dtype), C.to(x.dtype)
    kwargs = dict(
        dt_bias=dt_bias,
        chunk_size=chunk_size,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_final_state=return_final_state,
    )
    if backend not in BACKENDS:
        raise ValueError(f"unknown ssd backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = _choose_backend(x, segment_ids, initial_state)
    y, state = _IMPLEMENTATIONS[backend](x, dt, A, B, C, **kwargs)
    return (y, state) if return_final_state else y


def ssd_step(x, dt, A, B, C, *, dt_bias=None, state):
    """Advance the recurrence by one token.

    Args:
        x (Tensor): (B, H, P).
        dt (Tensor): (B, H).
        A (Tensor): (H,), fp32.
        B (Tensor): (B, G, N).
        C (Tensor): (B, G', N).
        dt_bias (Tensor, optional): (H,).
        state (Tensor): (B, H, P, N), fp32.

    Returns:
        tuple[Tensor, Tensor]: y (B, H, P) in x's dtype and the new state in fp32.
    """
    heads = x.shape[1]
    delta = _delta(dt, dt_bias)
    B, C = (_repeat_groups(t, heads, dim=1).float() for t in (B, C))
    decay = torch.exp(delta * A)[..., None, None]
    state = decay * state.float() + (delta[..., None] * x.float())[..., None] * B[:, :, None]
    return torch.einsum("bhpn,bhn->bhp", state, C).to(x.dtype), state


def number_segments(segment_ids):
    """Number the segments of every row 0, 1, 2, ..., so that an id that comes back joins nothing.

    Args:
        segment_ids (Tensor): Integers (B, L); a segment starts where they change.

    Returns:
        Tensor: (B, L), int64.
    """
    return segment_starts(segment_ids).cumsum(-1) - 1


def segment_starts(segment_ids):
    """Tensor: Boolean (B, L), True at the first token of every segment of ``segment_ids`` (B, L)."""
    return F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)


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


def _delta(dt, dt_bias):
    dt = dt.float()
    return F.softplus(dt if dt_bias is None else dt + dt_bias.float())


def _repeat_groups(tensor, heads, dim):
    groups = tensor.shape[dim]
    return tensor if groups == heads else tensor.repeat_interleave(heads // groups, dim=dim)


def _torch_ssd(x, dt, A, B, C, *, dt_bias, chunk_size, segment_ids, initial_state, return_final_state):
    """Readable twin: a loop over chunks that carries the state; decays and states stay in fp32."""
    batch, length, heads, width = x.shape
    dtype = x.dtype
    delta = _delta(dt, dt_bias)
    # Head-major (B, H, L, .) so that every product below is one batched matrix multiplication.
    B, C = (_repeat_groups(t, heads, dim=2).transpose(1, 2) for t in (B, C))
    x = (x * delta[..., None].to(dtype)).transpose(1, 2)
    log_decay = (delta * A.float()).clamp(max=0).transpose(1, 2)
    state = None if initial_state is None else initial_state.float()
    previous_segment = None if segment_ids is None else segment_ids[:, 0]

    # torch.split, not slicing: the backward of slices inside a loop is quadratic in the chunk count.
    segments = [None] * len(x.split(chunk_size, 2)) if segment_ids is None else segment_ids.split(chunk_size, 1)
    outputs = []
    for x_c, B_c, C_c, log_decay_c, segment_c in zip(
        x.split(chunk_size, 2), B.split(chunk_size, 2), C.split(chunk_size, 2), log_decay.split(chunk_size, 2), segments
    ):
        size = x_c.shape[2]
        total = log_decay_c.cumsum(-1)
        causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
        if segment_c is not None:
            causal = (causal & (segment_c[:, :, None] == segment_c[:, None, :]))[:, None]
        # Masked before exp: a positive difference above the diagonal would overflow, and its
        # gradient would be NaN even where the mask later discards it.
        pairwise = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf)
        # 1. Inside the chunk: attention-like product with the decay mask.
        scores = (C_c @ B_c.transpose(-1, -2)) * pairwise.exp().to(dtype)
        y = scores @ x_c
        # 2. What the carried state adds, decayed from the chunk's start.
        from_start = total.exp()
        to_end = (total[..., -1:] - total).exp()
        keep = total[..., -1].exp()
        if segment_c is not None:
            from_start = from_start * (segment_c == previous_segment[:, None])[:, None]
            to_end = to_end * (segment_c == segment_c[:, -1:])[:, None]
            keep = keep * (segment_c[:, -1] == previous_segment)[:, None]
            previous_segment = segment_c[:, -1]
        if state is not None:
            y = y + (C_c @ state.to(dtype).transpose(-1, -2)) * from_start[..., None].to(dtype)
        outputs.append(y)
        # 3. The state at the chunk's end.
        update = ((x_c * to_end[..., None].to(dtype)).transpose(-1, -2) @ B_c).float()
        state = update if state is None else state * keep[..., None, None] + update
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def _triton_ssd(x, dt, A, B, C, *, dt_bias, chunk_size, segment_ids, initial_state, return_final_state):
    """mamba-ssm's ``mamba_chunk_scan_combined``."""
    kernel = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    if max(t.numel() for t in (x, B, C)) >= INT32_ELEMENTS:
        raise ValueError(
            f"ssd backend 'triton' addresses at most 2**31 elements, x has {x.numel()}: use chunked prefill or 'fla'"
        )
    # The kernel takes one group count for B and C.
    heads = x.shape[2]
    if B.shape[2] != C.shape[2]:
        B, C = (_repeat_groups(t, heads, dim=2) for t in (B, C))
    y, state = kernel(
        x.contiguous(),
        dt.contiguous(),
        A.float(),
        B.contiguous(),
        C.contiguous(),
        max(chunk_size, 16),
        dt_bias=None if dt_bias is None else dt_bias.float(),
        dt_softplus=True,
        seq_idx=None if segment_ids is None else segment_ids.to(torch.int32).contiguous(),
        initial_states=initial_state,
        return_final_states=True,
    )
    return y, state.float()


def _fla_ssd(x, dt, A, B, C, *, dt_bias, chunk_size, segment_ids, initial_state, return_final_state):
    """flash-linear-attention's simple gated linear attention, with delta folded into x and the gate."""
    if segment_ids is not None:
        raise ValueError("ssd backend 'fla' takes packed rows as cu_seqlens, not as segment_ids: use 'torch' or 'triton'")
    kernel = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    heads = x.shape[2]
    B, C = (_repeat_groups(t, heads, dim=2) for t in (B, C))
    delta = _delta(dt, dt_bias)
    # fla keeps its state as (B, H, N, P).
    y, state = kernel(
        C.contiguous(),
        B.contiguous(),
        (x * delta[..., None].to(x.dtype)).contiguous(),
        g=delta * A.float(),
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.transpose(-1, -2).contiguous(),
        output_final_state=True,
    )
    return y, state.transpose(-1, -2).float()


_IMPLEMENTATIONS = {"torch": _torch_ssd, "triton": _triton_ssd, "fla": _fla_ssd}


def _choose_backend(x, segment_ids, initial_state):
    if not x.is_cuda:
        return "torch"
    for name, module in (("triton", "mamba_ssm"), ("fla", "fla")):
        if importlib.util.find_spec(module) is None or (name == "fla" and segment_ids is not None):
            continue
        if name == "triton" and x.numel() >= INT32_ELEMENTS:
            continue
        _announce(name)
        return name
    _announce("torch")
    return "torch"


@functools.lru_cache(maxsize=None)
def _announce(name):
    hint = "" if name != "torch" else " (correct but slower; pip install mamba-ssm or flash-linear-attention)"
    logger.info(f"ssd backend: {name}{hint}")
