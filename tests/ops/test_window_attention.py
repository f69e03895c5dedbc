"""Sliding-window attention against a softmax written out over the whole row."""

import pytest
import torch

from xtuner_ext.ops.window_attention import window_attention

B, H, G, P = 2, 4, 2, 8


def inputs(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, length, H, P), (B, length, G, P), (B, length, G, P)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def written_out(q, k, v, window, token_mask=None, segment_ids=None, sink=None, beyond=None):
    output = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = [
                s
                for s in range(max(0, t - window + 1), t + 1)
                if (token_mask is None or token_mask[b, s]) and (segment_ids is None or segment_ids[b, s] == segment_ids[b, t])
            ]
            for h in range(H):
                keys, values = k[b, seen, h // (H // G)], v[b, seen, h // (H // G)]
                if sink is not None and beyond[b, t]:
                    keys, values = (torch.cat([x, y[None, h // (H // G)]]) for x, y in zip((keys, values), sink))
                output[b, t, h] = torch.softmax(keys @ q[b, t, h] / P**0.5, 0) @ values
    return output


def sink_of(length, window):
    generator = torch.Generator().manual_seed(9)
    pair = tuple(torch.randn(G, P, generator=generator, dtype=torch.float64) for _ in range(2))
    return dict(sink=pair, beyond=(torch.arange(length) >= window).expand(B, -1))


@pytest.mark.parametrize("with_sink", [False, True], ids=["no sink", "sink"])
@pytest.mark.parametrize("window", [2, 5, 40], ids="window{}".format)
@pytest.mark.parametrize("length", [1, 4, 5, 6, 17], ids="length{}".format)
def test_equals_the_softmax_written_out(length, window, with_sink):
    q, k, v = inputs(length)
    more = sink_of(length, window) if with_sink else {}
    output, _ = window_attention(q, k, v, window=window, **more)
    torch.testing.assert_close(output, written_out(q, k, v, window, **more))


@pytest.mark.parametrize("sizes", [[17], [5, 5, 7], [3] * 5 + [2], [1] * 17, [16, 1]], ids=str)
def test_parts_equal_the_whole(sizes):
    q, k, v = inputs(17)
    more = sink_of(17, 5)
    whole, _ = window_attention(q, k, v, window=5, **more)
    parts, past = [], None
    for pieces in zip(*(t.split(sizes, dim=1) for t in (q, k, v, more["beyond"]))):
        part, past = window_attention(*pieces[:3], window=5, sink=more["sink"], beyond=pieces[3], past=past)
        parts.append(part)
    assert past.shape == (B, 4, 2 * G * P + 1)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_padding_on_the_left_changes_nothing():
    q, k, v = inputs(12)
    alone, state = window_attention(q, k, v, window=5)
    mask = torch.cat([torch.zeros(B, 6, dtype=torch.bool), torch.ones(B, 12, dtype=torch.bool)], dim=1)
    q, k, v = (torch.cat([noise, t], dim=1) for noise, t in zip(inputs(6, seed=1), (q, k, v)))
    padded, padded_state = window_attention(q, k, v, window=5, token_mask=mask)
    torch.testing.assert_close(padded[:, 6:], alone)
    assert padded.isfinite().all()
    assert torch.equal(state, padded_state)


def test_packed_samples_do_not_see_each_other():
    q, k, v = inputs(13)
    ids = torch.tensor([[0] * 4 + [1] * 9, [3] * 11 + [1] * 2])
    output, _ = window_attention(q, k, v, window=6, segment_ids=ids)
    torch.testing.assert_close(output, written_out(q, k, v, 6, segment_ids=ids))


def test_gradients_equal_those_of_the_softmax_written_out():
    tensors = [t.requires_grad_() for t in inputs(9)]
    more = sink_of(9, 4)
    for t in more["sink"]:
        t.requires_grad_()
    weight = torch.randn(B, 9, H, P, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = torch.autograd.grad((written_out(*tensors, 4, **more) * weight).sum(), [*tensors, *more["sink"]])
    found = torch.autograd.grad((window_attention(*tensors, window=4, **more)[0] * weight).sum(), [*tensors, *more["sink"]])
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("with_sink", [False, True], ids=["no sink", "sink"])
def test_padding_on_either_side_is_seen_by_no_real_token(with_sink):
    q, k, v = inputs(17)
    mask = torch.ones(B, 17, dtype=torch.bool)
    mask[0, :3], mask[1, -4:] = False, False
    more = sink_of(17, 5) if with_sink else {}
    if with_sink:
        more["beyond"] = torch.stack([torch.arange(17) - 3, torch.arange(17)]) >= 5
    output, _ = window_attention(q, k, v, window=5, token_mask=mask, **more)
    torch.testing.assert_close(output[mask], written_out(q, k, v, 5, token_mask=mask, **more)[mask])


def test_a_sink_begins_again_in_every_packed_sample():
    q, k, v = inputs(13)
    ids = torch.tensor([[0] * 4 + [1] * 9, [3] * 11 + [1] * 2])
    positions = torch.tensor([[*range(4), *range(9)], [*range(11), *range(2)]])
    more = dict(sink=sink_of(13, 5)["sink"], beyond=positions >= 5)
    output, _ = window_attention(q, k, v, window=5, segment_ids=ids, **more)
    torch.testing.assert_close(output, written_out(q, k, v, 5, segment_ids=ids, **more))
