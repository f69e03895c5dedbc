"""The causal convolution in Triton, forward and backward: one pass over the tokens each way and one for the taps.

Own kernel beside causal-conv1d's, which has to be compiled on the user's machine.

Axis letters: B batch, L length, D channels, W kernel width.
"""

import torch

try:
    # Of an exported folder's files transformers asks for every import that stands outside of a try block.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels of the causal convolution need the package triton") from error

TOKENS, CHANNELS = 64, 64


@triton.jit
def _tap(x, past, segments, batch, token, channel, own, back, length, D, x_b, x_l, HAS_PAST: tl.constexpr,
         HAS_SEGMENTS: tl.constexpr, W: tl.constexpr):
    """Inputs ``back`` tokens before ``token``, in fp32; before the row those of the state."""
    source = token - back
    inside = (source >= 0) & (token < length)
    if HAS_SEGMENTS:
        ids = tl.load(segments + batch * length + tl.maximum(source, 0), mask=token < length, other=-1)
        inside = inside & (ids == own)
    at = x + batch * x_b + source[:, None] * x_l + channel[None, :]
    value = tl.load(at, mask=inside[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)
    if HAS_PAST:
        early = (source < 0) & (token < length)
        if HAS_SEGMENTS:
            # The state belongs to the segment of the first token.
            early = early & (own == tl.load(segments + batch * length))
        at = past + (batch * D + channel[None, :]) * (W - 1) + (source[:, None] + W - 1)
        value += tl.load(at, mask=early[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def _forward_kernel(
    x, weight, bias, segments, past, y, length, D, x_b, x_l,
    HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_PAST: tl.constexpr, SILU: tl.constexpr,
    W: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    channel, batch = tl.program_id(1) * K + tl.arange(0, K), tl.program_id(2).to(tl.int64)
    own = token
    if HAS_SEGMENTS:
        own = tl.load(segments + batch * length + token, mask=token < length, other=-1)
    z = tl.zeros((T, K), dtype=tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(W):
        value = _tap(
            x, past, segments, batch, token, channel, own, back, length, D, x_b, x_l, HAS_PAST, HAS_SEGMENTS, W
        )
        z += value * tl.load(weight + channel * W + W - 1 - back, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    at = y + (batch * length + token[:, None]) * D + channel[None, :]
    tl.store(at, z.to(y.dtype.element_ty), mask=(token < length)[:, None] & (channel < D)[None, :])


@triton.jit
def _taps_gradient_kernel(
    x, weight, bias, segments, past, dy, dz, dtaps, length, D, tiles, x_b, x_l, dy_b, dy_l,
    HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_PAST: tl.constexpr, SILU: tl.constexpr,
    W: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
):
    """Gradient before the activation, (B, L, D), and of taps and bias in this tile, (B, tiles, W + 1, D)."""
    tile, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tile * T + tl.arange(0, T)
    channel = tl.program_id(1) * K + tl.arange(0, K)
    inside = (token < length)[:, None] & (channel < D)[None, :]
    own = token
    if HAS_SEGMENTS:
        own = tl.load(segments + batch * length + token, mask=token < length, other=-1)
    g = tl.load(dy + batch * dy_b + token[:, None] * dy_l + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = tl.zeros((T, K), dtype=tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
        for back in tl.static_range(W):
            value = _tap(
                x, past, segments, batch, token, channel, own, back, length, D, x_b, x_l, HAS_PAST, HAS_SEGMENTS, W
            )
            tap = tl.load(weight + channel * W + W - 1 - back, mask=channel < D, other=0.0).to(tl.float32)
            z += value * tap[None, :]
        share = tl.sigmoid(z)
        g = g * share * (1 + z * (1 - share))
    tl.store(dz + (batch * length + token[:, None]) * D + channel[None, :], g.to(dz.dtype.element_ty), mask=inside)
    out = dtaps + (batch * tiles + tile) * (W + 1) * D + channel
    for back in tl.static_range(W):
        value = _tap(
            x, past, segments, batch, token, channel, own, back, length, D, x_b, x_l, HAS_PAST, HAS_SEGMENTS, W
        )
        tl.store(out + (W - 1 - back) * D, tl.sum(value * g, 0), mask=channel < D)
    tl.store(out + W * D, tl.sum(g, 0), mask=channel < D)


@triton.jit
def _input_gradient_kernel(
    dz, weight, segments, dx, length, D, HAS_SEGMENTS: tl.constexpr, W: tl.constexpr, T: tl.constexpr, K: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    channel, batch = tl.program_id(1) * K + tl.arange(0, K), tl.program_id(2).to(tl.int64)
    own = token
    if HAS_SEGMENTS:
        own = tl.load(segments + batch * length + token, mask=token < length, other=-1)
    total = tl.zeros((T, K), dtype=tl.float32)
    for ahead in tl.static_range(W):
        reader = token + ahead
        inside = reader < length
        if HAS_SEGMENTS:
            inside = inside & (tl.load(segments + batch * length + reader, mask=inside, other=-1) == own)
        at = dz + (batch * length + reader[:, None]) * D + channel[None, :]
        g = tl.load(at, mask=inside[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)
        total += g * tl.load(weight + channel * W + W - 1 - ahead, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    at = dx + (batch * length + token[:, None]) * D + channel[None, :]
    tl.store(at, total.to(dx.dtype.element_ty), mask=(token < length)[:, None] & (channel < D)[None, :])


class _TritonConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, segments, past, silu):
        batch, length, channels = x.shape
        ctx.options = dict(
            HAS_SEGMENTS=segments is not None, W=weight.shape[1], T=TOKENS, K=CHANNELS, num_warps=4
        )
        ctx.case = dict(HAS_BIAS=bias is not None, HAS_PAST=past is not None, SILU=silu)
        ctx.grid = (triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS), batch)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        arguments = (x, weight, bias, segments, past)
        _forward_kernel[ctx.grid](*arguments, y, length, channels, *x.stride()[:2], **ctx.options, **ctx.case)
        ctx.save_for_backward(*arguments)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, segments, past = ctx.saved_tensors
        batch, length, channels = x.shape
        width, tiles = weight.shape[1], ctx.grid[0]
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dz, dx = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        dtaps = torch.empty(batch, tiles, width + 1, channels, dtype=torch.float32, device=x.device)
        _taps_gradient_kernel[ctx.grid](
            *(x, weight, bias, segments, past, dy, dz, dtaps),
            *(length, channels, tiles, *x.stride()[:2], *dy.stride()[:2]),
            **ctx.options,
            **ctx.case,
        )
        _input_gradient_kernel[ctx.grid](dz, weight, segments, dx, length, channels, **ctx.options)
        dtaps = dtaps.sum((0, 1))
        dweight = dtaps[:width].T.to(weight.dtype)
        dbias = None if bias is None else dtaps[width].to(bias.dtype)
        return dx, dweight, dbias, None, _past_gradient(dz, weight, segments, past), None


def _past_gradient(dz, weight, segments, past):
    """Gradient of the state before the row, (B, D, W - 1); a handful of tokens read it."""
    if past is None:
        return None
    reach, length = past.shape[-1], dz.shape[1]
    out = torch.zeros(past.shape, dtype=torch.float32, device=past.device)
    for token in range(min(reach, length)):
        g = dz[:, token].float()
        if segments is not None:
            g = g * (segments[:, token] == segments[:, 0])[:, None]
        # Token t reads entry j of the state through tap j - t.
        out[..., token:] += g[..., None] * weight[:, : reach - token].float()
    return out.to(past.dtype)


def native_conv(x, weight, bias=None, activation="silu", segment_ids=None, initial_state=None):
    """The convolution of :func:`~.causal_conv.causal_conv`; arguments as there.

    Returns:
        Tensor: (B, L, D).
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    segment_ids = None if segment_ids is None else segment_ids.to(torch.int32).contiguous()
    past = None if initial_state is None else initial_state.contiguous()
    bias = None if bias is None else bias.contiguous()
    return _TritonConv.apply(x, weight.contiguous(), bias, segment_ids, past, activation == "silu")
