"""Exact softmax attention over the last few tokens, in time and memory linear in the length.

Axis letters: B batch, L length, H query heads, G key/value heads, P head width, W window, Q block length.
"""

import torch
import torch.nn.functional as F

from .segments import number_segments


def window_attention(q, k, v, *, window, token_mask=None, segment_ids=None, sink=None, beyond=None, past=None):
    """Attend to the token itself and the ``window - 1`` before it.

    Args:
        q (Tensor): Queries, positions already applied, (B, L, H, P).
        k (Tensor): Keys, positions already applied, (B, L, G, P) with G dividing H.
        v (Tensor): Values, (B, L, G, P).
        window (int): Tokens seen, W.
        token_mask (Tensor, optional): Boolean (B, L), False at padding.
        segment_ids (Tensor, optional): Integers (B, L); samples packed into a row do not see each other.
        sink (tuple[Tensor, Tensor], optional): Key and value, (G, P) each, that stand for the first token
            of every sequence once it has left the window (Xiao et al., "Efficient streaming language
            models with attention sinks", 2023).
        beyond (Tensor, optional): Boolean (B, L), True where the sink is seen.
        past (Tensor, optional): What an earlier call returned for the tokens before these.

    Returns:
        tuple[Tensor, Tensor]: Outputs (B, L, H, P), and the last W-1 keys and values with a column that is 1
        where there was a token, (B, W-1, 2GP+1).
    """
    batch, length, heads, width = q.shape
    groups, reach = k.shape[2], window - 1
    valid = q.new_ones(batch, length, 1) if token_mask is None else token_mask[..., None].to(q.dtype)
    new = torch.cat([k.flatten(2), v.flatten(2), valid], dim=-1)
    if past is None:
        past = new.new_zeros(batch, reach, new.shape[-1])
    seen = torch.cat([past.to(new.dtype), new], dim=1)
    state = seen[:, seen.shape[1] - reach :]
    if length == 1:
        return _one_token(q, seen, sink, beyond), state

    # Blocks of Q queries, each with the Q + W - 1 keys that any of them may see.
    block = min(window, length)
    count = -(-length // block)
    surplus = count * block - length
    seen = F.pad(seen, (0, 0, 0, surplus)).unfold(1, block + reach, block).transpose(2, 3)
    keys, values, valid = seen.split([groups * width, groups * width, 1], dim=-1)
    keys, values = (t.unflatten(-1, (groups, width)).permute(0, 1, 3, 2, 4) for t in (keys, values))
    queries = F.pad(q, (0, 0, 0, 0, 0, surplus)).unflatten(1, (count, block)).transpose(2, 3)

    distance = reach + torch.arange(block, device=q.device)[:, None] - torch.arange(block + reach, device=q.device)
    visible = ((distance >= 0) & (distance < window)) & (valid[..., 0] > 0)[:, :, None]
    if segment_ids is not None:
        ids = F.pad(number_segments(segment_ids), (reach, surplus), value=-1).unfold(1, block + reach, block)
        visible = visible & (ids[:, :, reach:, None] == ids[:, :, None])
    if sink is not None:
        first = [t.to(q.dtype).expand(batch, count, -1, -1).unsqueeze(3) for t in sink]
        keys, values = torch.cat([keys, first[0]], dim=3), torch.cat([values, first[1]], dim=3)
        beyond = F.pad(beyond.expand(batch, -1), (0, surplus)).unflatten(1, (count, block))
        visible = torch.cat([visible, beyond[..., None]], dim=-1)
    # A padded query sees nothing; let it see itself, so that no row of the softmax is empty.
    own = F.pad(torch.eye(block, dtype=torch.bool, device=q.device), (reach, visible.shape[-1] - block - reach))
    visible = visible | own
    output = F.scaled_dot_product_attention(
        queries.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        attn_mask=visible.flatten(0, 1)[:, None],
        enable_gqa=groups != heads,
    )
    output = output.unflatten(0, (batch, count)).transpose(2, 3).flatten(1, 2)
    return output[:, :length], state


def _one_token(q, seen, sink, beyond):
    """(B, 1, H, P): the last of W tokens, which sees them all as far as there were any."""
    batch, _, heads, width = q.shape
    keys, values, valid = seen.split([(seen.shape[-1] - 1) // 2] * 2 + [1], dim=-1)
    visible = valid[..., 0] > 0
    # Whatever it holds, the token sees itself, so that the softmax is not empty.
    visible[:, -1] = True
    keys, values = (t.unflatten(-1, (-1, width)) for t in (keys, values))
    if sink is not None:
        first = [t.to(q.dtype).expand(batch, 1, -1, -1) for t in sink]
        keys, values = torch.cat([keys, first[0]], dim=1), torch.cat([values, first[1]], dim=1)
        visible = torch.cat([visible, beyond.expand(batch, -1)], dim=1)
    # The heads of a group stand where a sequence would, so that keys need not be repeated.
    grouped = q[:, 0].unflatten(1, (keys.shape[2], -1))
    output = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=visible[:, None, None]
    )
    return output.flatten(1, 2)[:, None]
