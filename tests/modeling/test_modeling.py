"""Any cut of a sequence gives the same numbers, whatever mixes the tokens."""

import pytest
import torch
import torch.nn.functional as F
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xtuner_ext.modeling import HybridCache, HybridVLConfig, HybridVLForCausalLM

Q = 8
IMAGE = 60
TOLERANCE = dict(rtol=1e-4, atol=1e-4)
KINDS = ("linear", "hybrid", "attention", "windowed")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(make_model, kind):
    return make_model(kind)


def make_ids(batch, length, seed=0):
    """Ordinary tokens, none of them an image token."""
    return torch.randint(3, IMAGE, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_tiles(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def with_images(*tile_counts, seed=0):
    """A prompt (1, L): a few words, then every image in its slots (4 to a tile), then a question."""
    words = make_ids(1, 3, seed)
    parts = [words]
    for count in tile_counts:
        parts += [torch.full((1, 4 * count), IMAGE), words + 1]
    return torch.cat(parts, dim=1)


def left_pad(rows):
    """Token ids (B, L) and mask of rows of different lengths; padding is an ordinary token."""
    length = max(row.shape[-1] for row in rows)
    ids = torch.full((len(rows), length), 7)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, length - row.shape[-1] :] = row
        mask[index, length - row.shape[-1] :] = 1
    return ids, mask


def generate(model, ids, tokens=6, **options):
    """New tokens (B, n)."""
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)[:, ids.shape[1] :]


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("sizes", [[1, 18], [Q, Q, 3], [Q - 1, 2, 10], [3] * 6 + [1]], ids=str)
@torch.no_grad()
def test_chunks_with_a_cache_equal_the_whole(model, sizes):
    ids = make_ids(2, sum(sizes))
    whole, cache, parts = model(ids).logits, HybridCache(model.config), []
    for part in ids.split(sizes, dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **TOLERANCE)
    assert cache.get_seq_length() == 19


@pytest.mark.parametrize("prefix", range(1, 2 * Q + 4), ids="prefix{}".format)
@torch.no_grad()
def test_prefill_and_decoding_equal_one_forward(model, prefix):
    ids = make_ids(2, prefix + 2)
    whole = model(ids).logits
    output = model(ids[:, :prefix], use_cache=True)
    torch.testing.assert_close(output.logits, whole[:, :prefix], **TOLERANCE)
    for t in (prefix, prefix + 1):
        output = model(ids[:, t : t + 1], past_key_values=output.past_key_values)
        torch.testing.assert_close(output.logits[:, 0], whole[:, t], **TOLERANCE)


@torch.no_grad()
def test_left_padding_changes_nothing(model):
    rows = [make_ids(1, length, seed=length) for length in (2, Q, 2 * Q + 3)]
    ids, mask = left_pad(rows)
    for index, row in enumerate(rows):
        padded = model(ids, attention_mask=mask).logits[index, -row.shape[1] :]
        torch.testing.assert_close(padded, model(row).logits[0], **TOLERANCE)


@torch.no_grad()
def test_left_padding_changes_nothing_in_chunks(model):
    """Also where a chunk of a row is padding and nothing else."""
    rows = [make_ids(1, length, seed=length) for length in (2, 2 * Q + 3)]
    ids, mask = left_pad(rows)
    cache, parts, end = HybridCache(model.config), [], 0
    for part in ids.split([5, Q, 5, 1], dim=1):
        end += part.shape[1]
        parts.append(model(part, attention_mask=mask[:, :end], past_key_values=cache).logits)
    for index, row in enumerate(rows):
        padded = torch.cat(parts, dim=1)[index, -row.shape[1] :]
        torch.testing.assert_close(padded, model(row).logits[0], **TOLERANCE)


@pytest.mark.parametrize("names", [[0, 1, 2, 3], [5, 3, 5, 3]], ids=["numbered", "ids come back"])
@torch.no_grad()
def test_packed_equals_separate(model, names):
    lengths = [5, 1, Q + 2, 3]
    rows = [make_ids(1, length, seed=length) for length in lengths]
    segments = torch.repeat_interleave(torch.tensor(names), torch.tensor(lengths))[None]
    packed = model(torch.cat(rows, dim=1), segment_ids=segments).logits.split(lengths, dim=1)
    for row, logits in zip(rows, packed):
        torch.testing.assert_close(logits, model(row).logits, **TOLERANCE)


LONG_ROPE = dict(
    rope_parameters={"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}, max_position_embeddings=8
)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 5], ids=["in-a-sample", "apart"])
def test_padding_of_a_packed_row_is_not_seen_and_sees_something(make_model, padding):
    model, ids = make_model("hybrid"), make_ids(1, 10)
    segments = torch.tensor([padding] * 3 + [0] * 7)[None]
    mask = torch.tensor([0] * 3 + [1] * 7)[None]
    logits = model(ids, attention_mask=mask, segment_ids=segments).logits
    torch.testing.assert_close(logits[:, 3:], model(ids[:, 3:]).logits, **TOLERANCE)
    context = model.model.layer_context(model.embed(ids), mask, segment_ids=segments)
    seen = context["attention_mask"][0, 0]
    assert seen.any(-1).all() and not seen[3:, :3].any()


@pytest.mark.parametrize("padding", ["none", "right"])
def test_rows_without_left_padding_or_packing_build_no_mask(make_model, padding):
    model, ids, mask = make_model("attention"), make_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    if padding == "right":
        mask[1, -5:] = 0
    context = model.model.layer_context(model.embed(ids), mask)
    assert context["attention_mask"] is None and context["packing"] is None
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[1:, :7], model(ids[1:, :7]).logits, **TOLERANCE)


def test_left_padding_still_builds_one(make_model):
    model, (ids, mask) = make_model("attention"), left_pad([make_ids(1, 12), make_ids(1, 7)])
    assert model.model.layer_context(model.embed(ids), mask)["attention_mask"].shape == (2, 1, 12, 12)


def attend_segments(module, query, key, value, attention_mask, scaling, dropout=0.0, **packing):
    """What flash attention's kernel for unequal lengths does with transformers' arguments, one segment at a time."""
    batch, heads, length, _ = query.shape
    assert attention_mask is None and torch.equal(packing["cu_seq_lens_q"], packing["cu_seq_lens_k"])
    query, key, value = (t.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for t in (query, key, value))
    parts, bounds = [], packing["cu_seq_lens_q"].tolist()
    assert packing["max_length_q"] == packing["max_length_k"] == max(b - a for a, b in zip(bounds, bounds[1:]))
    for begin, end in zip(bounds, bounds[1:]):
        q, k, v = (t[:, :, begin:end] for t in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True))
    return torch.cat(parts, dim=2)[0].transpose(0, 1).unflatten(0, (batch, length)), None


PACKED_MASKS = {"full": [0, 0], "padded at the end": [0, 4], "padded at the start": [3, 0]}


@pytest.mark.parametrize("left, right", PACKED_MASKS.values(), ids=PACKED_MASKS)
def test_flash_attention_learns_where_packed_samples_begin(make_model, left, right, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_twin", attend_segments)
    model, ids, mask = make_model("hybrid"), make_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    segments = torch.tensor([[5] * 3 + [0] * 4 + [5] * 7, [1] * 14])
    mask[0, :left], mask[1, 14 - right :] = 0, 0
    expected = model(ids, attention_mask=mask, segment_ids=segments).logits
    model.config._attn_implementation = "flash_twin"
    found = model(ids, attention_mask=mask, segment_ids=segments).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **TOLERANCE)


@pytest.mark.gpu
def test_flash_attention_keeps_packed_samples_apart(make_model):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("flash_attn")
    model, ids = make_model("attention").to("cuda", torch.bfloat16), make_ids(2, 14).cuda()
    segments = torch.tensor([[5] * 3 + [0] * 4 + [5] * 7, [1] * 14]).cuda()
    expected = model(ids, segment_ids=segments).logits
    model.config._attn_implementation = "flash_attention_2"
    found = model(ids, segment_ids=segments).logits
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_no_loss_falls_on_the_first_token_of_a_packed_segment(make_model):
    model, lengths = make_model("hybrid"), [6, 1, 9]
    rows = [make_ids(1, length, seed) for seed, length in enumerate(lengths)]
    segments = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    ids = torch.cat(rows, dim=1)
    labels = ids.clone()
    packed = model(ids, labels=labels, segment_ids=segments).loss
    alone = [model(row, labels=row).loss * (length - 1) for row, length in zip(rows, lengths) if length > 1]
    assert torch.isclose(packed, sum(alone) / sum(length - 1 for length in lengths), rtol=1e-5)
    assert torch.equal(labels, ids)


def test_positions_restart_in_every_packed_segment(make_model):
    """Samples shorter than the limit of the rotary scaling stay below it, however long the row is."""
    model, rows = make_model("attention", **LONG_ROPE), [make_ids(1, 7, seed=seed) for seed in range(3)]
    packed = model(torch.cat(rows, 1), segment_ids=torch.arange(3).repeat_interleave(7)[None]).logits
    for row, logits in zip(rows, packed.split(7, dim=1)):
        torch.testing.assert_close(logits, model(row).logits, **TOLERANCE)


@pytest.mark.parametrize("chunk", [None, 4], ids=["at once", "in chunks"])
@torch.no_grad()
def test_positions_start_after_left_padding(make_model, chunk):
    model, row = make_model("attention", **LONG_ROPE), make_ids(1, 7)
    ids, mask = left_pad([row, make_ids(1, 20)])
    expected = model(row).logits[:, -1]
    torch.testing.assert_close(model(ids[:1], attention_mask=mask[:1]).logits[:, -1], expected, **TOLERANCE)
    cache = model.prefill(ids[:1, :-1], attention_mask=mask[:1, :-1], chunk_size=chunk)
    last = model(ids[:1, -1:], attention_mask=mask[:1], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, expected, **TOLERANCE)


@torch.no_grad()
def test_packed_rows_may_hold_images(model):
    rows, tiles = [with_images(1), with_images(2, 1)], make_tiles(4)
    lengths = [row.shape[1] for row in rows]
    segments = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))[None]
    packed = model(torch.cat(rows, 1), pixel_values=tiles, segment_ids=segments).logits.split(lengths, dim=1)
    for row, part, logits in zip(rows, (tiles[:1], tiles[1:]), packed):
        torch.testing.assert_close(logits, model(row, pixel_values=part).logits, **TOLERANCE)


def test_packing_does_not_go_with_a_cache(model):
    ids = make_ids(1, 4)
    with pytest.raises(ValueError, match="packs training rows and does not go with a decoding cache"):
        model(ids, segment_ids=torch.zeros_like(ids), past_key_values=HybridCache(model.config))


def test_later_tokens_do_not_reach_earlier_ones(model):
    ids = make_ids(1, 2 * Q)
    other = ids.clone()
    other[:, Q + 1 :] = make_ids(1, Q - 1, seed=5)
    assert torch.equal(model(ids).logits[:, : Q + 1], model(other).logits[:, : Q + 1])


@torch.no_grad()
def test_logits_to_keep_and_hidden_states(model):
    ids = make_ids(2, 5)
    output = model(ids, output_hidden_states=True)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:], **TOLERANCE)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[0], model.embed(ids))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_loss_is_the_mean_over_supervised_next_tokens(model):
    ids = make_ids(2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    output = model(ids, labels=labels)
    chosen = output.logits[:, 3:-1].log_softmax(-1).gather(-1, ids[:, 4:, None])
    torch.testing.assert_close(output.loss, -chosen.mean())


def test_gradient_checkpointing_gives_the_same_gradients(model):
    ids = make_ids(2, Q + 3)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda text: f"{name}: {text}")


# ---------------------------------------------------------------- cache


@pytest.mark.parametrize("length", [1, Q + 3], ids="length{}".format)
@torch.no_grad()
def test_cache_takes_what_the_configuration_says(model, length):
    cache = model(make_ids(2, length), use_cache=True).past_key_values
    assert cache.nbytes() == 2 * model.config.cache_bytes(length, dtype_bytes=4)


@torch.no_grad()
def test_bf16_cache_takes_what_the_configuration_says(model):
    cache = model.to(torch.bfloat16)(make_ids(1, 5), use_cache=True).past_key_values
    assert cache.nbytes() == model.config.cache_bytes(5)


@torch.no_grad()
def test_cache_after_reset_is_like_new(model):
    ids, cache = make_ids(1, 5), HybridCache(model.config)
    first = model(ids, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, first)


# ---------------------------------------------------------------- generate


def test_greedy_generation_follows_the_largest_logit(model):
    ids = make_ids(2, 5)
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, ids[:, :5]), ids[:, 5:])


def test_batch_of_different_lengths_equals_singles(model):
    rows = [make_ids(1, length, seed=length) for length in (1, 4, 2 * Q + 1)]
    ids, mask = left_pad(rows)
    together = generate(model, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        assert torch.equal(together[index : index + 1], generate(model, row)), index


def test_rows_stop_at_their_own_end_token(model):
    ids = make_ids(2, 5)
    free = generate(model, ids, tokens=10)
    first, second = free.tolist()
    end = next(token for token in first if token not in second)
    stop = first.index(end)
    stopped = generate(model, ids, tokens=10, eos_token_id=end, pad_token_id=0).tolist()
    assert stopped[0] == first[: stop + 1] + [0] * (9 - stop)
    assert stopped[1] == second


def test_sampling_repeats_with_its_seed(model):
    ids = make_ids(2, 5)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=8, do_sample=True).tolist()

    assert sample(0) == sample(0) != sample(1)


def test_sequences_of_one_prompt_are_sampled_independently(model):
    ids = make_ids(1, 9)
    torch.manual_seed(0)
    output = model.generate(
        ids, max_new_tokens=6, do_sample=True, num_return_sequences=3, prefill_chunk_size=4
    )
    assert output.shape == (3, 15) and len(set(map(tuple, output.tolist()))) > 1
    assert (output[:, :9] == ids).all()


@pytest.mark.parametrize("chunk", [None, 4], ids=["at once", "chunked prefill"])
def test_beam_scores_are_the_log_probabilities_of_their_tokens(model, chunk):
    """Beams swap places in the cache; a state left behind would spoil the scores."""
    ids = make_ids(2, 9)
    output = model.generate(
        ids,
        max_new_tokens=6,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        suppress_tokens=[IMAGE],
        prefill_chunk_size=chunk,
    )
    sequences = output.sequences
    logs = model(sequences).logits[:, 8:-1].log_softmax(-1).gather(-1, sequences[:, 9:, None]).sum((1, 2))
    torch.testing.assert_close(output.sequences_scores, logs, rtol=1e-3, atol=1e-3)


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("chunk", [None, 3], ids=["at once", "chunked prefill"])
def test_streamer_gets_prompt_and_tokens(model, chunk):
    ids, streamer = make_ids(1, 7), Collector()
    answer = generate(model, ids, streamer=streamer, prefill_chunk_size=chunk)
    assert streamer.tokens == ids[0].tolist() + answer[0].tolist() and streamer.ended


@pytest.mark.parametrize("chunk", [1, 3, Q, 100], ids="chunk{}".format)
def test_prefill_in_chunks_gives_the_same_tokens(model, chunk):
    ids, mask = left_pad([make_ids(1, 2 * Q + 3), make_ids(1, 4, seed=1)])
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("chunk", [None, 3], ids=["at once", "chunked prefill"])
def test_continuing_a_conversation_equals_starting_over(model, chunk):
    cache, ids = HybridCache(model.config), make_ids(1, 5)
    for turn in range(3):
        expected = generate(model, ids)
        answer = generate(model, ids, past_key_values=cache, prefill_chunk_size=chunk)
        assert torch.equal(answer, expected), f"turn {turn}"
        ids = torch.cat([ids, answer, make_ids(1, turn + 1, seed=turn)], dim=1)
    # Nothing is read twice: the last turn's tail is all that the cache lacks.
    assert cache.get_seq_length() == ids.shape[1] - 3 - 1


def test_continuing_a_left_padded_batch_equals_starting_over(model):
    ids, mask = left_pad([make_ids(1, 5), make_ids(1, 9, seed=1)])
    cache = HybridCache(model.config)
    answer = generate(model, ids, attention_mask=mask, past_key_values=cache)
    more = torch.cat([ids, answer, make_ids(2, 3)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 9, dtype=torch.long)], dim=1)
    continued = generate(model, more, attention_mask=mask, past_key_values=cache)
    assert torch.equal(continued, generate(model, more, attention_mask=mask))


# ---------------------------------------------------------------- images


def test_batch_with_different_images_equals_singles(model):
    rows = [with_images(1), with_images(2, 1, seed=1), make_ids(1, 6)]
    tiles = make_tiles(4)
    ids, mask = left_pad(rows)
    together = generate(model, ids, attention_mask=mask, pixel_values=tiles)
    chunked = generate(model, ids, attention_mask=mask, pixel_values=tiles, prefill_chunk_size=5)
    assert torch.equal(chunked, together)
    for index, (row, part) in enumerate(zip(rows, (tiles[:1], tiles[1:], None))):
        assert torch.equal(together[index : index + 1], generate(model, row, pixel_values=part)), index


def test_the_image_matters_and_its_place_too(model):
    ids, tiles = with_images(1, 1), make_tiles(2)
    logits = model(ids, pixel_values=tiles).logits
    assert not torch.allclose(model(ids, pixel_values=tiles.flip(0)).logits, logits, atol=1e-2)


def test_continuing_with_a_second_image_equals_starting_over(model):
    cache, tiles = HybridCache(model.config), make_tiles(2)
    first = with_images(1)
    answer = generate(model, first, pixel_values=tiles[:1], past_key_values=cache)
    ids = torch.cat([first, answer, with_images(1, seed=3)], dim=1)
    continued = generate(model, ids, pixel_values=tiles[1:], past_key_values=cache)
    assert torch.equal(continued, generate(model, ids, pixel_values=tiles))


def test_beams_of_a_prompt_with_an_image(model):
    ids, tiles = with_images(1), make_tiles(1)
    beams = model.generate(ids, pixel_values=tiles, max_new_tokens=4, num_beams=2, do_sample=False)
    other = model.generate(ids, pixel_values=2 * tiles, max_new_tokens=4, num_beams=2, do_sample=False)
    assert beams.shape == (1, ids.shape[1] + 4)
    log = [
        model(row, pixel_values=tiles).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
        .gather(-1, row[:, ids.shape[1] :, None]).sum()
        for row in (beams, other, torch.cat([ids, generate(model, ids, 4, pixel_values=tiles)], dim=1))
    ]
    assert log[0] >= max(log) - 1e-4


@pytest.mark.parametrize(
    "tiles, message",
    [
        (2, "2 tiles give 8 vectors for 4 image tokens"),
        (0, "the input has 4 image tokens, but no image was passed"),
        (None, "the input has 4 image tokens, but no image was passed"),
    ],
    ids=["two for one", "no tile", "nothing"],
)
def test_tiles_must_fill_their_slots(make_model, tiles, message):
    pixels = None if tiles is None else make_tiles(tiles)
    with pytest.raises(ValueError, match=message):
        make_model()(with_images(1), pixel_values=pixels)


@pytest.mark.parametrize("tiles", [2, None], ids=["two for one", "nothing"])
def test_generate_checks_the_slots_too(make_model, tiles):
    pixels = None if tiles is None else make_tiles(tiles)
    with pytest.raises(ValueError, match="4 image tokens"):
        make_model().generate(with_images(1), pixel_values=pixels, max_new_tokens=2)


def test_text_model_refuses_an_image(make_model):
    model = make_model(vision=None)
    assert model(make_ids(1, 3)).logits.shape == (1, 3, 64)
    with pytest.raises(ValueError, match="no image front end, but pixel_values were passed"):
        model(make_ids(1, 3), pixel_values=make_tiles(1))


# ---------------------------------------------------------------- saving


def test_saved_model_gives_the_same_logits(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = HybridVLForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids, tiles = with_images(2), make_tiles(2)
    assert torch.equal(loaded.eval()(ids, pixel_values=tiles).logits, model(ids, pixel_values=tiles).logits)


@torch.no_grad()
def test_dynamic_rope_survives_saving_and_long_sequences(make_model, tmp_path):
    model = make_model("attention", **LONG_ROPE)
    model.save_pretrained(tmp_path)
    loaded = HybridVLForCausalLM.from_pretrained(tmp_path).eval()
    for length in (30, 20, 8, 5):
        ids = make_ids(1, length)
        fresh = make_model("attention", **LONG_ROPE)
        assert torch.equal(loaded(ids).logits, fresh(ids).logits), length


def test_bf16_model_keeps_decay_and_time_steps_exact(make_model, tmp_path):
    model = make_model("hybrid", mixer=dict(use_D=True))
    model.save_pretrained(tmp_path)
    loaded = HybridVLForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = ("A_log", "dt_bias", "D")
    originals = dict(model.named_parameters())
    seen = set()
    for name, parameter in loaded.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in kept:
            seen.add(last)
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, originals[name]), name
        else:
            assert parameter.dtype == torch.bfloat16, name
    assert seen == set(kept)
    ids = make_ids(1, 2 * Q)
    with torch.no_grad():
        exact, half = model(ids).logits, loaded.eval()(ids).logits.float()
    assert (half - exact).norm() / exact.norm() < 0.05


def test_a_cast_to_bf16_leaves_frequencies_and_decays_in_fp32():
    config = HybridVLConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["full_attention", "linear_attention"],
    )
    model = HybridVLForCausalLM(config)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    for cast in (lambda: model.to(torch.bfloat16), model.bfloat16, lambda: model.to("cpu", torch.bfloat16)):
        cast()
        assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
        mixer = model.model.layers[1].mixer
        assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
        assert mixer.q_proj.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16


def test_answers_from_embeddings_are_those_from_tokens(tiny_model):
    """XTuner's LLaVA hands embeddings over, which hold pictures that no token stands for."""
    model = tiny_model("full_attention", "linear_attention", "linear_attention")
    ids = torch.randint(3, 80, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, 7:]
    embeds = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeds, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)
