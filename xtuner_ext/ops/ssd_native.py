"""The SSD scan in Triton, forward and backward.

Own kernels beside mamba-ssm's and fla's, which search dozens of block sizes on first use: on an H200 the first call
of either takes a minute for each combination of options, and of these four seconds.

Axis letters: B batch, L length, H heads, G groups, P head width, N state width, Q chunk length. With ``c`` the sum of
log-decays since the chunk's start, S the state that enters a chunk and ``[.]`` 1 within one segment:

    from_start_i = exp(c_i) [i, previous]     to_end_j = delta_j exp(c_Q - c_j) [j, last]
    keep = exp(c_Q) [last, previous]
    W_ij = exp(c_i - c_j) delta_j [i, j], j <= i
    y_i = sum_j (C_i . B_j) W_ij x_j + from_start_i S C_i
    S <- keep S + sum_j to_end_j x_j B_j^T
"""

import torch

try:
    # Of an exported folder's files transformers asks for every import that stands outside of a try block.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels of the SSD scan need the package triton") from error

from .ssd_torch import LOG2_E, STRONGEST_DECAY

# Bounds a token's log-decay as in the twin: a larger one would eat the digits of the sums.
_STRONGEST = tl.constexpr(STRONGEST_DECAY / LOG2_E)


@triton.jit
def _softplus(z):
    # log1p by Kahan's correction: plain log(1 + e) is off by 1e-4 at time steps of 1e-3.
    e = tl.exp(tl.minimum(z, 20.0))
    u = 1.0 + e
    small = tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(z > 20.0, z, small)


@triton.jit
def _decays_kernel(
    dt, bias, A, segments, delta, cumulated, from_start, to_end, keep,
    length, chunks, heads, dt_b, dt_l, dt_h,
    HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, Q: tl.constexpr,
):
    """Time steps and decay factors of one chunk and head; the outputs are (B, H, chunks * Q)."""
    chunk, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    inside = tl.arange(0, Q)
    token = chunk * Q + inside
    z = tl.load(dt + batch * dt_b + token * dt_l + head * dt_h, mask=token < length, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + head).to(tl.float32)
    step = _softplus(z)
    decay = tl.maximum(tl.minimum(step * tl.load(A + head).to(tl.float32), 0.0), _STRONGEST)
    total = tl.cumsum(decay, 0)
    last = tl.sum(tl.where(inside == Q - 1, total, 0.0), 0)
    start, end, kept = tl.exp(total), step * tl.exp(last - total), tl.exp(last)
    if HAS_SEGMENTS:
        # Segments are numbered upwards; past the end of the row the last one goes on.
        ids = segments + batch * length
        own = tl.load(ids + tl.minimum(token, length - 1))
        previous = tl.load(ids + tl.maximum(chunk * Q - 1, 0))
        final = tl.load(ids + tl.minimum(chunk * Q + Q - 1, length - 1))
        start = tl.where(own == previous, start, 0.0)
        end = tl.where(own == final, end, 0.0)
        kept = tl.where(final == previous, kept, 0.0)
    at = row * chunks * Q + token
    tl.store(delta + at, step)
    tl.store(cumulated + at, total)
    tl.store(from_start + at, start)
    tl.store(to_end + at, end)
    tl.store(keep + row * chunks + chunk, kept)


@triton.jit
def _outer_kernel(
    left, right, weight, out,
    length, chunks, heads, P, N, left_b, left_l, left_h, right_b, right_l, right_h, right_share,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):
    """sum_j weight_j left_j right_j^T of one chunk and head, (B, H, chunks, P, N) in fp32."""
    chunk, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    token = chunk * Q + tl.arange(0, Q)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    at = left + batch * left_b + head * left_h + token[None, :] * left_l + p[:, None]
    columns = tl.load(at, mask=(token[None, :] < length) & (p[:, None] < P), other=0.0)
    at = right + batch * right_b + (head // right_share) * right_h + token[:, None] * right_l + n[None, :]
    rows = tl.load(at, mask=(token[:, None] < length) & (n[None, :] < N), other=0.0)
    w = tl.load(weight + row * chunks * Q + token)
    columns = (columns.to(tl.float32) * w[None, :]).to(rows.dtype)
    product = tl.dot(columns, rows, input_precision=PRECISION)
    at = out + (row * chunks + chunk) * P * N + p[:, None] * N + n[None, :]
    tl.store(at, product, mask=(p[:, None] < P) & (n[None, :] < N))


@triton.jit
def _pass_kernel(
    local, keep, first, passed, final, chunks, size,
    HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Carry states over the chunks: what enters each one, and what leaves the last."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_FIRST:
        state = tl.load(first + row * size + at, mask=mask, other=0.0)
    for step in range(chunks):
        chunk = row * chunks + (chunks - 1 - step if REVERSE else step)
        own = tl.load(local + chunk * size + at, mask=mask, other=0.0)
        tl.store(passed + chunk * size + at, state.to(passed.dtype.element_ty), mask=mask)
        state = state * tl.load(keep + chunk) + own
    tl.store(final + row * size + at, state, mask=mask)


@triton.jit
def _output_kernel(
    x, B, C, delta, cumulated, from_start, segments, states, y,
    length, chunks, heads, P, N,
    x_b, x_l, x_h, B_b, B_l, B_h, B_share, C_b, C_l, C_h, C_share, y_b, y_l, y_h,
    HAS_SEGMENTS: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):
    chunk, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    inside = tl.arange(0, Q)
    token = chunk * Q + inside
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    real, wide, deep = token[:, None] < length, p[None, :] < P, n[None, :] < N
    at = row * chunks * Q + token
    total, step = tl.load(cumulated + at), tl.load(delta + at)
    at_b = B + batch * B_b + (head // B_share) * B_h + token[:, None] * B_l + n[None, :]
    b = tl.load(at_b, mask=real & deep, other=0.0)
    at_c = C + batch * C_b + (head // C_share) * C_h + token[:, None] * C_l + n[None, :]
    c = tl.load(at_c, mask=real & deep, other=0.0)
    v = tl.load(x + batch * x_b + head * x_h + token[:, None] * x_l + p[None, :], mask=real & wide, other=0.0)
    # 1. What the carried state adds.
    matrix = states + (row * chunks + chunk) * P * N + p[None, :] * N + n[:, None]
    s = tl.load(matrix, mask=wide & (n[:, None] < N), other=0.0)
    out = tl.dot(c, s, input_precision=PRECISION) * tl.load(from_start + at)[:, None]
    # 2. Inside the chunk; masked before exp, which overflows above the diagonal.
    visible = inside[:, None] >= inside[None, :]
    if HAS_SEGMENTS:
        ids = tl.load(segments + batch * length + tl.minimum(token, length - 1))
        visible = visible & (ids[:, None] == ids[None, :])
    weight = tl.exp(tl.where(visible, total[:, None] - total[None, :], float("-inf"))) * step[None, :]
    scores = tl.dot(c, tl.trans(b), input_precision=PRECISION) * weight
    out += tl.dot(scores.to(v.dtype), v, input_precision=PRECISION)
    at = y + batch * y_b + head * y_h + token[:, None] * y_l + p[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=real & wide)


@triton.jit
def _gradient_kernel(
    x, B, C, dy, delta, cumulated, from_start, to_end, keep, segments, states, dstates,
    dx, dB, dC, ddelta, dcumulated,
    length, chunks, heads, P, N,
    x_b, x_l, x_h, B_b, B_l, B_h, B_share, C_b, C_l, C_h, C_share, dy_b, dy_l, dy_h,
    HAS_SEGMENTS: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):
    """All gradients of one chunk and head; dx, dB and dC are contiguous (B, L, H, .)."""
    chunk, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    inside = tl.arange(0, Q)
    token = chunk * Q + inside
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    real, wide, deep = token[:, None] < length, p[None, :] < P, n[None, :] < N
    at = row * chunks * Q + token
    total, step = tl.load(cumulated + at), tl.load(delta + at)
    start, end = tl.load(from_start + at), tl.load(to_end + at)
    at_b = B + batch * B_b + (head // B_share) * B_h + token[:, None] * B_l + n[None, :]
    b = tl.load(at_b, mask=real & deep, other=0.0)
    at_c = C + batch * C_b + (head // C_share) * C_h + token[:, None] * C_l + n[None, :]
    c = tl.load(at_c, mask=real & deep, other=0.0)
    v = tl.load(x + batch * x_b + head * x_h + token[:, None] * x_l + p[None, :], mask=real & wide, other=0.0)
    g = tl.load(dy + batch * dy_b + head * dy_h + token[:, None] * dy_l + p[None, :], mask=real & wide, other=0.0)
    visible = inside[:, None] >= inside[None, :]
    if HAS_SEGMENTS:
        ids = tl.load(segments + batch * length + tl.minimum(token, length - 1))
        visible = visible & (ids[:, None] == ids[None, :])
    decay = tl.exp(tl.where(visible, total[:, None] - total[None, :], float("-inf")))
    weight = decay * step[None, :]
    scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
    dscores = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    # 1. Inside the chunk.
    by_step = scores * dscores * decay
    dstep = tl.sum(by_step, 0)
    by_decay = by_step * step[None, :]
    dtotal = tl.sum(by_decay, 1) - tl.sum(by_decay, 0)
    gx = tl.dot(tl.trans((scores * weight).to(g.dtype)), g, input_precision=PRECISION)
    dscores = (dscores * weight).to(b.dtype)
    gc = tl.dot(dscores, b, input_precision=PRECISION)
    gb = tl.dot(tl.trans(dscores), c, input_precision=PRECISION)
    # 2. Through the state that entered.
    matrix = (row * chunks + chunk) * P * N + p[:, None] * N + n[None, :]
    inner = (p[:, None] < P) & deep
    s = tl.load(states + matrix, mask=inner, other=0.0)
    through = tl.dot(g, s, input_precision=PRECISION) * start[:, None]
    gc += through
    dtotal += tl.sum(through * c.to(tl.float32), 1)
    # 3. Through the state that left.
    ds = tl.load(dstates + matrix, mask=inner, other=0.0)
    kept = tl.sum(s.to(tl.float32) * ds.to(tl.float32)) * tl.load(keep + row * chunks + chunk)
    through = tl.dot(v, ds, input_precision=PRECISION)
    reached = tl.sum(through * b.to(tl.float32), 1)
    gb += through * end[:, None]
    gx += tl.dot(b, tl.trans(ds), input_precision=PRECISION) * end[:, None]
    # to_end is step * exp(c_Q - c_j) where it is not masked; a skipped token has step 0.
    last = tl.sum(tl.where(inside == Q - 1, total, 0.0), 0)
    fade = tl.exp(last - total)
    if HAS_SEGMENTS:
        final = tl.load(segments + batch * length + tl.minimum(chunk * Q + Q - 1, length - 1))
        fade = tl.where(ids == final, fade, 0.0)
    dstep += reached * fade
    reached = reached * end
    dtotal += tl.where(inside == Q - 1, tl.sum(reached, 0) + kept, 0.0) - reached
    out = (batch * length + token[:, None]) * heads + head
    tl.store(dx + out * P + p[None, :], gx.to(dx.dtype.element_ty), mask=real & wide)
    tl.store(dB + out * N + n[None, :], gb.to(dB.dtype.element_ty), mask=real & deep)
    tl.store(dC + out * N + n[None, :], gc.to(dC.dtype.element_ty), mask=real & deep)
    tl.store(ddelta + at, dstep)
    tl.store(dcumulated + at, dtotal)


@triton.jit
def _decays_gradient_kernel(
    dt, bias, A, delta, ddelta, dcumulated, ddt, dA,
    length, chunks, heads, dt_b, dt_l, dt_h,
    HAS_BIAS: tl.constexpr, Q: tl.constexpr,
):
    """Gradients of one chunk's time steps, (B, L, H), and its part of A's, (B, H, chunks)."""
    chunk, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    token = chunk * Q + tl.arange(0, Q)
    z = tl.load(dt + batch * dt_b + token * dt_l + head * dt_h, mask=token < length, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + head).to(tl.float32)
    at = row * chunks * Q + token
    total = tl.load(dcumulated + at)
    # Every log-decay is in all sums from its own token on.
    dlog = tl.sum(total, 0) - tl.cumsum(total, 0) + total
    rate = tl.load(A + head).to(tl.float32)
    step = tl.load(delta + at)
    dlog = tl.where(step * rate <= 0.0, dlog, 0.0)
    gradient = (tl.load(ddelta + at) + dlog * rate) * tl.sigmoid(z)
    tl.store(ddt + (batch * length + token) * heads + head, gradient, mask=token < length)
    tl.store(dA + row * chunks + chunk, tl.sum(dlog * step, 0))


class _TritonSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, bias, segments, initial_state, chunk_size):
        shape = _Shape(x, B, C, chunk_size)
        decays = shape.decays(dt, bias, A, segments)
        states, final = shape.states(x, B, decays, initial_state)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _output_kernel[shape.grid](
            *(x, B, C, decays["delta"], decays["cumulated"], decays["from_start"], segments, states, y),
            *(*shape.sizes, shape.P, shape.N, *x.stride()[:3], *shape.grouped(B), *shape.grouped(C), *y.stride()[:3]),
            HAS_SEGMENTS=segments is not None,
            **shape.blocks,
        )
        ctx.save_for_backward(x, dt, A, B, C, bias, segments, initial_state)
        ctx.shape = shape
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, bias, segments, initial_state = ctx.saved_tensors
        shape, heads = ctx.shape, x.shape[2]
        dy = dy.contiguous()
        decays = shape.decays(dt, bias, A, segments)
        # Recomputed: kept from the forward pass, the states would take more memory than all inputs.
        states, _ = shape.states(x, B, decays, initial_state)
        local = shape.outer(dy, C, decays["from_start"])
        dstates, dinitial = shape.carry(local, decays["keep"], dfinal.float().contiguous(), x.dtype, reverse=True)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # One share a head; the heads of a group are summed below.
        dB, dC = (torch.empty(*x.shape[:3], shape.N, dtype=t.dtype, device=x.device) for t in (B, C))
        ddelta, dcumulated = torch.empty_like(decays["delta"]), torch.empty_like(decays["delta"])
        _gradient_kernel[shape.grid](
            *(x, B, C, dy),
            *(decays[name] for name in ("delta", "cumulated", "from_start", "to_end", "keep")),
            *(segments, states, dstates, dx, dB, dC, ddelta, dcumulated),
            *(*shape.sizes, shape.P, shape.N, *x.stride()[:3], *shape.grouped(B), *shape.grouped(C), *dy.stride()[:3]),
            HAS_SEGMENTS=segments is not None,
            **shape.blocks,
        )
        ddt = torch.empty(dt.shape, dtype=torch.float32, device=x.device)
        dA = torch.empty_like(decays["keep"])
        _decays_gradient_kernel[shape.grid](
            *(dt, bias, A, decays["delta"], ddelta, dcumulated, ddt, dA, *shape.sizes, *dt.stride()),
            HAS_BIAS=bias is not None,
            Q=shape.Q,
        )
        dB, dC = (
            d if t.shape[2] == heads else d.unflatten(2, (t.shape[2], -1)).float().sum(3).to(t.dtype)
            for d, t in ((dB, B), (dC, C))
        )
        dbias = None if bias is None else ddt.sum((0, 1)).to(bias.dtype)
        dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
        return dx, ddt.to(dt.dtype), dA.sum((0, 2)).to(A.dtype), dB, dC, dbias, None, dinitial, None


class _Shape:
    """Launch parameters of one call."""

    def __init__(self, x, B, C, chunk_size):
        self.batch, self.length, self.heads, self.P = x.shape
        self.N, self.Q = B.shape[-1], chunk_size
        self.chunks = -(-self.length // self.Q)
        self.grid = (self.chunks, self.batch * self.heads)
        self.sizes = (self.length, self.chunks, self.heads)
        tf32 = torch.backends.cuda.matmul.allow_tf32
        precision = "tf32" if tf32 or x.dtype != torch.float32 else "tf32x3"
        self.blocks = dict(
            Q=self.Q,
            BP=max(16, triton.next_power_of_2(self.P)),
            BN=max(16, triton.next_power_of_2(self.N)),
            PRECISION=precision,
            num_warps=8 if self.Q > 64 else 4,
        )

    def grouped(self, tensor):
        """Strides of B or C, and how many heads share one of its groups."""
        return (*tensor.stride()[:3], self.heads // tensor.shape[2])

    def decays(self, dt, bias, A, segments):
        """Factors of every token and chunk."""
        empty = lambda *size: torch.empty(self.batch, self.heads, *size, dtype=torch.float32, device=dt.device)
        names = ("delta", "cumulated", "from_start", "to_end")
        factors = {name: empty(self.chunks * self.Q) for name in names}
        factors["keep"] = empty(self.chunks)
        _decays_kernel[self.grid](
            *(dt, bias, A, segments, *factors.values(), *self.sizes, *dt.stride()),
            HAS_BIAS=bias is not None,
            HAS_SEGMENTS=segments is not None,
            Q=self.Q,
        )
        return factors

    def outer(self, left, right, weight):
        """Weighted sum of outer products of every chunk, (B, H, chunks, P, N)."""
        size = (self.batch, self.heads, self.chunks, self.P, self.N)
        out = torch.empty(size, dtype=torch.float32, device=left.device)
        strides = (*left.stride()[:3], *self.grouped(right))
        _outer_kernel[self.grid](left, right, weight, out, *self.sizes, self.P, self.N, *strides, **self.blocks)
        return out

    def carry(self, local, keep, first, dtype, reverse=False):
        """States that enter every chunk, in the products' dtype, and the one that leaves the last, in fp32."""
        size = self.P * self.N
        passed = torch.empty(local.shape, dtype=dtype, device=local.device)
        final = torch.empty(self.batch, self.heads, self.P, self.N, dtype=torch.float32, device=local.device)
        block = 512
        _pass_kernel[(triton.cdiv(size, block), self.batch * self.heads)](
            *(local, keep, first, passed, final, self.chunks, size),
            HAS_FIRST=first is not None,
            REVERSE=reverse,
            BLOCK=block,
        )
        return passed, final

    def states(self, x, B, decays, initial_state):
        """See :meth:`carry`."""
        first = None if initial_state is None else initial_state.float().contiguous()
        return self.carry(self.outer(x, B, decays["to_end"]), decays["keep"], first, x.dtype)


def native_ssd(x, dt, A, B, C, *, dt_bias=None, segment_ids=None, initial_state=None, chunk_size=None):
    """The scan of :func:`~.ssd.ssd`; arguments as there.

    Args:
        chunk_size (int, optional): Q, a power of two of at least 16; by default what was fastest on an H200.

    Returns:
        tuple[Tensor, Tensor]: y and the final state in fp32.
    """
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    A, dt_bias = A.contiguous(), None if dt_bias is None else dt_bias.contiguous()
    segment_ids = None if segment_ids is None else segment_ids.to(torch.int32).contiguous()
    if chunk_size is None:
        # Longer chunks write fewer states; their gradients no longer fit the registers.
        given = (x, dt, A, B, C, dt_bias, initial_state)
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        chunk_size = 64 if trains else 128
    return _TritonSSD.apply(x, dt, A, B, C, dt_bias, segment_ids, initial_state, chunk_size)
