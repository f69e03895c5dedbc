"""The SSD scan in plain torch, with its backward written down.

Axis letters: B batch, L length, H heads, G groups, P head width, N state width, Q chunk length; K is the number of
different (B, C) pairs and R = H / K the heads that share one.

One chunk lies in the processor's cache at a time. With T the running sum of log2-decays inside the chunk, S the state
before it and delta the time steps, forward is

    1.  W = (C B^T) * D * delta        D[t, s] = 2^(T[t] - T[s]) for s <= t, else 0
    2.  y = W x + 2^T * (C S^T)
    3.  S <- 2^T[end] S + (2^(T[end] - T) * delta * x)^T B

and backward is the same three lines differentiated, from the last chunk to the first, with D and W computed again.
Of the forward pass only the states between chunks are kept.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LOG2_E = 1.4426950408889634
# 2^-150 is zero in fp32, so a stronger decay changes no result; without a bound it would eat the digits of the
# running sum, and with them the decays of all later tokens of the chunk.
STRONGEST_DECAY = -256.0


def torch_ssd(x, dt, A, B, C, *, dt_bias, chunk_size, segment_ids, initial_state):
    """Scan on any device; the arguments are those of ``ssd``.

    Returns:
        tuple[Tensor, Tensor]: y (B, L, H, P) in x's dtype and the final state (B, H, P, N) in fp32.
    """
    given = (x, dt, A, B, C, dt_bias, initial_state)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    return _TorchSSD.apply(*given, segment_ids, chunk_size, trains)


class _TorchSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, dt_bias, initial_state, segment_ids, chunk_size, trains):
        ctx.set_materialize_grads(False)
        with _own_precision(x):
            chunks = _Chunks(x, dt, A, B, C, dt_bias, segment_ids, chunk_size)
            state = chunks.copy_state(initial_state)
            y = torch.empty_like(x, memory_format=torch.contiguous_format)
            states = [_forward_chunk(chunks, c, state, y, trains) for c in range(chunks.count)]
        if trains:
            ctx.save_for_backward(x, dt, A, B, C, dt_bias, segment_ids, *states)
            ctx.chunk_size = chunk_size
            ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, dt, A, B, C, dt_bias, segment_ids, *states = ctx.saved_tensors
        with _own_precision(x):
            chunks = _Chunks(x, dt, A, B, C, dt_bias, segment_ids, ctx.chunk_size)
            dy = torch.zeros_like(x) if dy is None else dy
            dstate = chunks.copy_state(dstate)
            gradients = _Gradients(chunks)
            for c in reversed(range(chunks.count)):
                _backward_chunk(chunks, c, states[c], dy, dstate, gradients)
            ddt, dA, dbias = gradients.of_time_steps()
        dinitial = None if ctx.state_dtype is None else dstate.to(ctx.state_dtype)
        return gradients.x, ddt, dA, gradients.B, gradients.C, dbias, dinitial, None, None, None


def _forward_chunk(chunks, c, state, y, keep):
    """Write a chunk's part of ``y`` and update ``state`` in place; return the state before, in x's dtype."""
    x, span = chunks.x, chunks.span(c)
    B, C = chunks.rows(chunks.B, c), chunks.rows(chunks.C, c)
    before = chunks.low("before", chunks.pair_state(state), keep)
    # 1. Inside the chunk: attention with decays instead of a softmax.
    weights = chunks.weigh(chunks.product("scores", C, B.mT), chunks.decays(c).mul_(chunks.delta_row(c)))
    inside = chunks.product("inside", weights, chunks.by_head(x, c))
    # 2. What the state before the chunk adds.
    carried = chunks.product("carried", C, before.mT)
    from_start = chunks.beside_x(chunks.from_start, c)
    torch.addcmul(chunks.token_major(inside), chunks.token_major(carried), from_start.to(x.dtype), out=y[:, span])
    # 3. The state after it.
    writes = chunks.scale("writes", x[:, span], chunks.beside_x(chunks.writing, c))
    chunks.advance(state, c, writes, B)
    return before


def _backward_chunk(chunks, c, before, dy, dstate, gradients):
    """Fill a chunk's part of ``gradients``; take ``dstate`` in place from the state after to the one before."""
    x, span = chunks.x, chunks.span(c)
    B, C = chunks.rows(chunks.B, c), chunks.rows(chunks.C, c)
    after = chunks.low("after", chunks.pair_state(dstate))
    writing = chunks.beside_x(chunks.writing, c)

    # 1. W = (C B^T) * D * delta.
    scores = chunks.product("scores", C, B.mT)
    decays, delta = chunks.decays(c), chunks.delta_row(c)
    dy_heads = chunks.by_head(dy, c)
    dweights = chunks.product("dweights", dy_heads, chunks.by_head(x, c).mT).view_as(decays)
    dscores = chunks.multiply("dscores", dweights, decays)
    shares = chunks.multiply("shares", chunks.split_heads(dscores), scores[:, None]).view_as(decays)
    dscores = chunks.low("dscores in x's dtype", chunks.sum_heads(dscores.mul_(delta)))
    weights = chunks.weigh(scores, decays.mul_(delta))
    dx = chunks.token_major(chunks.product("inside", weights.mT, dy_heads))
    # 2. y = W x + 2^T * (C S^T).
    dcarried = chunks.scale("carried", dy[:, span], chunks.beside_x(chunks.from_start, c))
    dC = chunks.product("dC", dcarried, before)
    gradients.take_reads(c, _reads(chunks, C, dC, dcarried, before))
    # 3. The state after.
    writes = chunks.scale("writes", x[:, span], writing)
    dB = chunks.product("dB", writes, after)
    dwrites = chunks.token_major(chunks.product("dwrites", B, after.mT))
    gradients.take_writes(c, chunks.multiply("written", dwrites, x[:, span]).sum(-1, dtype=torch.float32))
    torch.addcmul(dx, dwrites, writing.to(x.dtype), out=gradients.x[:, span])

    gradients.take_weights(c, shares)
    gradients.take_state(c, chunks.multiply("kept", dstate, before.view_as(dstate)).sum((-1, -2)))
    gradients.store(gradients.C, dC.baddbmm_(dscores, B), c)
    gradients.store(gradients.B, dB.baddbmm_(dscores.mT, C), c)
    chunks.advance(dstate, c, dcarried, C)


def _reads(chunks, C, dC, dcarried, before):
    """Tensor: What every token's loss owes to the state before the chunk, (B, H, Q) in fp32."""
    if chunks.shared == 1:
        return chunks.multiply("read", C, dC).sum(-1, dtype=torch.float32).unflatten(0, (chunks.batch, chunks.heads))
    carried = chunks.product("read", C, before.mT).mul_(dcarried)
    return chunks.token_major(carried).sum(-1, dtype=torch.float32).transpose(1, 2)


class _Chunks:
    """Decays of all tokens, and the pieces of one chunk as matrices."""

    def __init__(self, x, dt, A, B, C, dt_bias, segment_ids, chunk_size):
        self.x, self.dt, self.A, self.B, self.C, self.dt_bias = x, dt, A, B, C, dt_bias
        self.batch, self.length, self.heads, self.width = x.shape
        self.state_width = B.shape[-1]
        self.pairs = _count_pairs(self.heads, B.shape[2], C.shape[2])
        self.shared = self.heads // self.pairs
        self.size = min(chunk_size, max(self.length, 1))
        self.count = -(-self.length // self.size)
        self.rooms = {}
        self.future = torch.full((self.size, self.size), -torch.inf, device=x.device).triu_(1)
        # Head-major and padded to whole chunks by tokens that do nothing: (B, H, chunk, Q).
        self.delta = self._by_chunk(time_steps(dt, dt_bias).transpose(1, 2))
        log_decay = (self.delta * (A.float() * LOG2_E)[:, None, None]).clamp_(STRONGEST_DECAY, 0)
        self.total = log_decay.cumsum_(-1)
        end = self.total[..., -1:]
        self.from_start, self.to_end, self.keep = self.total.exp2(), (end - self.total).exp2_(), end.exp2()
        self.ids = None
        if segment_ids is not None:
            self.ids = self._by_chunk(segment_ids[:, None], mode="replicate")
            last = self.ids[..., -1:]
            before = torch.cat([self.ids[:, :, :1, :1], last[:, :, :-1]], dim=2)
            self.from_start *= self.ids == before
            self.to_end *= self.ids == last
            self.keep *= last == before
        self.writing = self.to_end * self.delta

    def _by_chunk(self, t, mode="constant"):
        missing = self.count * self.size - self.length
        if missing and mode == "replicate":
            t = torch.cat([t, t[..., -1:].expand(-1, -1, missing)], dim=-1)
        elif missing:
            t = F.pad(t, (0, missing))
        return t.unflatten(-1, (self.count, self.size)).contiguous()

    def span(self, c):
        """slice: Tokens of a chunk."""
        return slice(c * self.size, min((c + 1) * self.size, self.length))

    def of(self, t, c):
        """Tensor: Part in a chunk of numbers (B, H, chunk, Q), (B, H, Q)."""
        return t[:, :, c, : self.length - c * self.size]

    def copy_state(self, given):
        """Tensor: A state to update in place, (B, H, P, N) in fp32."""
        if given is None:
            return self.x.new_zeros(self.batch, self.heads, self.width, self.state_width, dtype=torch.float32)
        return given.to(torch.float32, memory_format=torch.contiguous_format, copy=True)

    # Layouts. Products need one matrix for every pair or head in the first axis.

    def rows(self, t, c):
        """Tensor: B's or C's part in a chunk, (B K, Q, N)."""
        t = t[:, self.span(c)].transpose(1, 2)
        if t.shape[1] != self.pairs:
            t = t[:, :, None].expand(-1, -1, self.pairs // t.shape[1], -1, -1)
        # Contiguous, for products of strided bf16 matrices are copied every time.
        return t.flatten(0, -3).contiguous()

    def by_head(self, t, c):
        """Tensor: x's part in a chunk, (B H, Q, P)."""
        return t[:, self.span(c)].transpose(1, 2).flatten(0, 1).contiguous()

    def scale(self, name, t, factor):
        """Tensor: Product of (B, Q, H, P) and (B, Q, H, 1) in x's dtype, as (B K, Q, R P)."""
        size, pairs, shared = t.shape[1], self.pairs, self.shared
        out = self.room(name, (self.batch * pairs, size, shared * self.width), self.x.dtype)
        token_major = out.view(self.batch, pairs, size, shared, self.width).transpose(1, 2)
        t, factor = (value.unflatten(2, (pairs, shared)) for value in (t, factor.to(t.dtype)))
        torch.mul(t, factor, out=token_major)
        return out

    def token_major(self, t):
        """Tensor: (B H, Q, P) or (B K, Q, R P) as (B, Q, H, P)."""
        size = t.shape[1]
        if t.shape[2] == self.width:
            return t.view(self.batch, self.heads, size, self.width).transpose(1, 2)
        return t.view(self.batch, self.pairs, size, self.shared, self.width).transpose(1, 2).flatten(2, 3)

    def split_heads(self, t):
        """Tensor: (B, H, Q, Q) as (B K, R, Q, Q)."""
        return t.view(self.batch * self.pairs, self.shared, *t.shape[2:])

    def sum_heads(self, t):
        """Tensor: (B, H, Q, Q) summed over the heads of every pair, (B K, Q, Q)."""
        t = self.split_heads(t)
        return t[:, 0] if self.shared == 1 else t.sum(1)

    def pair_state(self, state):
        """Tensor: (B, H, P, N) as (B K, R P, N)."""
        return state.view(self.batch * self.pairs, self.shared * self.width, self.state_width)

    def beside_x(self, t, c):
        """Tensor: Part in a chunk of factors (B, H, chunk, Q), to multiply x with, (B, Q, H, 1)."""
        return self.of(t, c).transpose(1, 2)[..., None]

    def delta_row(self, c):
        """Tensor: Time steps of the tokens that a row of W reads, (B, H, 1, Q)."""
        return self.of(self.delta, c)[:, :, None]

    # Work. Every result lies in a room of its own name that the next chunk reuses: fresh memory would cost as
    # much as the products.

    def room(self, name, shape, dtype):
        """Tensor: Uninitialised memory."""
        if name not in self.rooms or self.rooms[name].shape != shape:
            self.rooms[name] = torch.empty(shape, dtype=dtype, device=self.x.device)
        return self.rooms[name]

    def product(self, name, left, right):
        """Tensor: Matrix products in x's dtype."""
        return torch.bmm(left, right, out=self.room(name, (*left.shape[:2], right.shape[2]), self.x.dtype))

    def multiply(self, name, left, right):
        """Tensor: Elementwise product in fp32, of left's shape."""
        return torch.mul(left, right, out=self.room(name, left.shape, torch.float32))

    def low(self, name, t, fresh=False):
        """Tensor: ``t`` in x's dtype; with ``fresh`` in memory of its own."""
        if fresh:
            return t.to(self.x.dtype, copy=True)
        return t if t.dtype == self.x.dtype else self.room(name, t.shape, self.x.dtype).copy_(t)

    def decays(self, c):
        """Tensor: D of a chunk, (B, H, Q, Q) in fp32."""
        total = self.of(self.total, c)
        size = total.shape[-1]
        mask = self.future[:size, :size]
        if self.ids is not None:
            ids = self.of(self.ids, c)
            mask = mask.masked_fill(ids[..., None] != ids[..., None, :], -torch.inf)
        decays = self.room("decays", (*total.shape, size), torch.float32)
        # Masked before the power: above the diagonal the difference is positive and would overflow.
        return torch.sub(total[..., None], total[..., None, :], out=decays).add_(mask).exp2_()

    def weigh(self, scores, decays):
        """Tensor: W of the scores (B K, Q, Q) and the decays (B, H, Q, Q), which it overwrites; (B H, Q, Q)."""
        decays = self.low("weights", decays)
        self.split_heads(decays).mul_(scores[:, None])
        return decays.flatten(0, 1)

    def advance(self, state, c, left, right):
        """Take a state (B, H, P, N) over a chunk in place: decay it and add left^T right."""
        state.mul_(self.keep[:, :, c, :, None])
        state, left = self.pair_state(state), left.mT
        if left.dtype == state.dtype:
            state.baddbmm_(left, right)
        else:
            state.add_(self.product("update", left, right))


class _Gradients:
    """Gradients of the sequences, filled chunk by chunk.

    A time step acts twice: it scales what its token writes (``delta``), and it is one term of the running sum
    ``total``, whose gradient is, token by token, what the token got from others less what others got from it.
    """

    def __init__(self, chunks):
        self.chunks = chunks
        self.x, self.B, self.C = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (chunks.x, chunks.B, chunks.C)
        )
        self.delta, self.total = torch.zeros_like(chunks.delta), torch.zeros_like(chunks.delta)

    def store(self, out, value, c):
        """Keep a gradient (B K, Q, N) of B or C, summed over the pairs that read one group."""
        chunks, groups = self.chunks, out.shape[2]
        value = value.unflatten(0, (chunks.batch, groups, chunks.pairs // groups))
        value = value[:, :, 0] if value.shape[2] == 1 else value.sum(2)
        out[:, chunks.span(c)].copy_(value.transpose(1, 2))

    def take_reads(self, c, reads):
        """What tokens got from the state before the chunk, (B, H, Q)."""
        self.chunks.of(self.total, c).add_(reads)

    def take_writes(self, c, writes):
        """What the state after the chunk got from tokens, by unit of ``writing``, (B, Q, H)."""
        writes = writes.transpose(1, 2) * self.chunks.of(self.chunks.to_end, c)
        self.chunks.of(self.delta, c).add_(writes)
        writes = writes * self.chunks.of(self.chunks.delta, c)
        self.chunks.of(self.total, c).sub_(writes)
        self.total[:, :, c, -1] += writes.sum(-1)

    def take_weights(self, c, shares):
        """What tokens got from each other by unit of delta, (B, H, Q, Q); overwritten."""
        delta = self.chunks.delta_row(c)
        self.chunks.of(self.delta, c).add_(shares.sum(-2))
        # What a token gave itself passed no decay. Left in, it would cancel only up to rounding.
        shares.diagonal(dim1=-2, dim2=-1).zero_()
        shares.mul_(delta)
        self.chunks.of(self.total, c).add_(shares.sum(-1)).sub_(shares.sum(-2))

    def take_state(self, c, kept):
        """What the state after the chunk got from the one before, by unit of its decay, (B, H)."""
        self.total[:, :, c, -1] += kept * self.chunks.keep[:, :, c, 0]

    def of_time_steps(self):
        """tuple[Tensor, Tensor, Tensor | None]: Gradients of dt, A and dt_bias."""
        chunks = self.chunks
        log_decay = self.total.flip(-1).cumsum(-1).flip(-1)
        dA = (log_decay * chunks.delta).sum((0, 2, 3))
        delta = self.delta.addcmul_(log_decay, chunks.A.float()[:, None, None])
        raw = delta.flatten(2)[..., : chunks.length].transpose(1, 2)
        raw = raw * torch.sigmoid(_biased(chunks.dt, chunks.dt_bias))
        dbias = None if chunks.dt_bias is None else raw.sum((0, 1)).to(chunks.dt_bias.dtype)
        return raw.to(chunks.dt.dtype), dA.to(chunks.A.dtype), dbias


def time_steps(dt, dt_bias):
    """Tensor: delta = softplus(dt + dt_bias) in fp32."""
    return F.softplus(_biased(dt, dt_bias))


def _biased(dt, dt_bias):
    return dt.float() if dt_bias is None else dt.float() + dt_bias.float()


def _count_pairs(heads, groups_B, groups_C):
    most, least = max(groups_B, groups_C), min(groups_B, groups_C)
    return most if most % least == 0 else heads


def _own_precision(x):
    """Context: Products in the operands' dtype, also under mixed precision."""
    return torch.autocast(x.device.type, enabled=False)
