"""Triton kernels of :mod:`xtuner_ext.ops.decode_attention`; imported only where Triton is installed."""

try:
    # Of an exported folder's files transformers asks for every import that stands outside of a try block.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels of decode_attention need the package triton") from error


@triton.jit
def part_kernel(
    q,
    keys,
    values,
    last,
    mask,
    parts,
    tops,
    totals,
    scale,
    key_batch,
    key_group,
    key_token,
    value_batch,
    value_group,
    value_token,
    mask_batch,
    GROUPS: tl.constexpr,
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Softmax over one share of one group's keys, for all query heads of the group."""
    # Offsets into a long batch's keys pass 2**31.
    batch = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = (tl.program_id(0) % GROUPS).to(tl.int64)
    split = tl.program_id(1)
    length = tl.load(last).to(tl.int32) + 1
    share = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, length)

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    head = (batch * GROUPS + group) * REPEATS + rows
    inside = (rows < REPEATS)[:, None] & (columns < WIDTH)[None, :]
    query = tl.load(q + head[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    keys += batch * key_batch + group * key_group
    values += batch * value_batch + group * value_group

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    part = tl.zeros((ROWS, PADDED), tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        seen = token < end
        if MASKED:
            seen = seen & (tl.load(mask + batch * mask_batch + token, mask=seen, other=0) != 0)
        offset = token.to(tl.int64)[:, None]
        there = seen[:, None] & (columns < WIDTH)[None, :]
        key = tl.load(keys + offset * key_token + columns[None, :], mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A share of padding alone has seen nothing yet: -inf - -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - shift[:, None])
        fade = tl.exp(top - shift)
        value = tl.load(values + offset * value_token + columns[None, :], mask=there, other=0.0)
        total = total * fade + tl.sum(weights, 1)
        part = part * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        top = new_top

    slot = head * SPLITS + split
    tl.store(parts + slot[:, None] * WIDTH + columns[None, :], part, mask=inside)
    tl.store(tops + slot, top, mask=rows < REPEATS)
    tl.store(totals + slot, total, mask=rows < REPEATS)


@triton.jit
def join_kernel(
    parts, tops, totals, output, WIDTH: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr
):
    """Join the shares of one query head."""
    head = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    columns = tl.arange(0, PADDED)
    top = tl.load(tops + head * SPLITS + splits)
    highest = tl.max(top, 0)
    weight = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight * tl.load(totals + head * SPLITS + splits), 0)
    at = (head * SPLITS + splits)[:, None] * WIDTH + columns[None, :]
    part = tl.load(parts + at, mask=(columns < WIDTH)[None, :], other=0.0)
    joined = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(output + head * WIDTH + columns, joined.to(output.dtype.element_ty), mask=columns < WIDTH)
