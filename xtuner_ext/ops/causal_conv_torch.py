"""The causal convolution in plain torch, with its backward written down.

Axis letters: B batch, L length, D channels, W kernel width, Q tokens handled at once.

For kernels of two to four taps, shifted multiply-adds cost less than a transpose and a convolution, provided that the
tokens handled at once stay in the processor's cache: memory is then read and written once, not once for every tap.
Sums are taken in fp32.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Numbers handled at once on a CPU: 1 MiB in fp32, with a few of the kind in work.
BLOCK = 2**18


def torch_conv(x, weight, bias, activation, segment_ids, initial_state):
    """Convolve on any device; the arguments are those of ``causal_conv``.

    Returns:
        Tensor: (B, L, D) in x's dtype.
    """
    return _TorchConv.apply(x, weight, bias, initial_state, segment_ids, activation)


class _TorchConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, segment_ids, activation):
        ctx.save_for_backward(x, weight, bias, initial_state, segment_ids)
        ctx.activation = activation
        blocks = _Blocks(x, weight, bias, initial_state, segment_ids)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for start in blocks.starts:
            sums = blocks.sums(start, blocks.given(start))
            y[:, start : start + sums.shape[1]] = F.silu(sums, inplace=True) if activation else sums
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, initial_state, segment_ids = ctx.saved_tensors
        blocks, before = _Blocks(x, weight, bias, initial_state, segment_ids), weight.shape[1] - 1
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dtaps, dbias, dpast = [torch.zeros_like(tap) for tap in blocks.taps], torch.zeros_like(blocks.taps[0]), None
        # From the end, for the gradient of an input takes those of the W - 1 sums after it.
        later = x.new_zeros(x.shape[0], before, x.shape[2], dtype=torch.float32)
        for start in reversed(blocks.starts):
            size = min(blocks.size, blocks.length - start)
            given, dsums = blocks.given(start), blocks.room("dsums", size + before)
            dsums[:, size:] = later
            here = dsums[:, :size]
            here.copy_(dy[:, start : start + size])
            if ctx.activation:
                torch.ops.aten.silu_backward(here, blocks.sums(start, given), grad_input=here)
            dbias += here.sum((0, 1))
            reached = blocks.room("sums", size).zero_()
            for back, tap in enumerate(blocks.taps):
                reached.addcmul_(blocks.within(dsums[:, back : back + size], start + back, back), tap)
                taken = blocks.within(blocks.taken(given, back), start, back)
                dtaps[back] += torch.mul(here, taken, out=blocks.room("products", size)).sum((0, 1))
            dx[:, start : start + size] = reached
            later = dsums[:, :before].clone()
        if initial_state is not None:
            dpast = blocks.gradient_of_past(later).to(initial_state.dtype)
        dweight = torch.stack(dtaps[::-1], dim=1).to(weight.dtype)
        return dx, dweight, None if bias is None else dbias.to(bias.dtype), dpast, None, None


class _Blocks:
    """Inputs of a few tokens at a time, in fp32 and with the W - 1 tokens before them."""

    def __init__(self, x, weight, bias, initial_state, segment_ids):
        self.x, self.bias, self.ids = x, bias, segment_ids
        batch, self.length, channels = x.shape
        self.width = weight.shape[1]
        # Tap number ``back`` multiplies the token that many places back.
        self.taps = [weight[:, self.width - 1 - back].float() for back in range(self.width)]
        fitting = BLOCK // max(1, batch * channels) if x.device.type == "cpu" else self.length
        self.size = max(1, min(self.length, fitting))
        self.starts = range(0, self.length, self.size)
        self.past = x.new_zeros(batch, self.width - 1, channels)
        if initial_state is not None:
            self.past = initial_state.to(x.dtype).transpose(1, 2)
        self.rooms = {}

    def room(self, name, size):
        """Tensor: Uninitialised memory that is used again, (B, ``size``, D) in fp32."""
        shape = (self.x.shape[0], size, self.x.shape[2])
        if name not in self.rooms or self.rooms[name].shape != shape:
            self.rooms[name] = torch.empty(shape, dtype=torch.float32, device=self.x.device)
        return self.rooms[name]

    def given(self, start):
        """Tensor: Inputs of a block after those of the W - 1 tokens before it, (B, W - 1 + Q, D)."""
        before, size = self.width - 1, min(self.size, self.length - start)
        given, held = self.room("given", before + size), min(start, before)
        given[:, : before - held] = self.past[:, held:]
        given[:, before - held :] = self.x[:, start - held : start + size]
        return given

    def taken(self, given, back):
        """Tensor: What a block's tokens read ``back`` places before them, (B, Q, D)."""
        first = self.width - 1 - back
        return given[:, first : first + given.shape[1] - (self.width - 1)]

    def within(self, t, start, back):
        """Tensor: ``t`` (B, Q, D), zero where the token ``back`` places before is of another segment."""
        if self.ids is None or back == 0 or not self.length:
            return t
        # What lies before the first token belongs to its segment; beyond the last there is nothing to read.
        now = torch.arange(start, start + t.shape[1], device=t.device)
        before, now = (self.ids[:, at.clamp(0, self.length - 1)] for at in (now - back, now))
        same = before == now
        # Asking a GPU would make it wait.
        if t.device.type == "cpu" and same.all():
            return t
        return t * same[..., None].to(t.dtype)

    def sums(self, start, given):
        """Tensor: Convolution of a block before the activation, (B, Q, D)."""
        sums = self.room("sums", given.shape[1] - (self.width - 1))
        torch.mul(self.taken(given, 0), self.taps[0], out=sums)
        for back in range(1, self.width):
            sums.addcmul_(self.within(self.taken(given, back), start, back), self.taps[back])
        return sums if self.bias is None else sums.add_(self.bias.float())

    def gradient_of_past(self, dsums):
        """Tensor: Gradient of the initial state, (B, D, W - 1), from those of the first W - 1 sums."""
        gradient, before = torch.zeros_like(dsums), self.width - 1
        for back in range(1, self.width):
            gradient[:, before - back :] += self.within(dsums[:, :back], 0, back) * self.taps[back]
        return gradient.transpose(1, 2)
