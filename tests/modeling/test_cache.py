"""A cache of whatever kind changes no answer, and what it holds stays where it is."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xtuner_ext.modeling import HybridCache, graphs, modeling
from xtuner_ext.modeling.cache import StateLayer

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
    return torch.randint(3, IMAGE, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_pad(rows):
    length = max(row.shape[-1] for row in rows)
    ids, mask = torch.full((len(rows), length), 7), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, length - row.shape[-1] :], mask[index, length - row.shape[-1] :] = row, 1
    return ids, mask


def generate(model, ids, tokens=6, **options):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("room", [1, 5, 64], ids="room for {}".format)
@torch.no_grad()
def test_a_static_cache_gives_the_logits_of_the_whole(model, room):
    ids = make_ids(2, 23)
    whole, cache, parts = model(ids).logits, HybridCache(model.config, max_length=room), []
    for part in ids.split([9, 1, 1, 3, 1, 8], dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **TOLERANCE)
    assert cache.get_seq_length() == 23 and cache.rows == 2


def test_a_state_is_kept_contiguous_whatever_a_kernel_returns():
    layer, state = StateLayer(), torch.randn(2, 3, 5, 4).mT
    layer.update_recurrent_state(state)
    kept = layer.recurrent_states[0]
    # Steps write over it, which takes a contiguous one.
    assert kept.is_contiguous() and torch.equal(kept, state)


@pytest.mark.parametrize("room", [None, 32], ids="room for {}".format)
def test_copies_made_under_inference_mode_can_be_continued(model, room):
    ids, cache = make_ids(1, 12), HybridCache(model.config, max_length=room)
    with torch.no_grad():
        model.prefill(ids[:, :10], past_key_values=cache)
    with torch.inference_mode():
        twin = cache.copy()
        twin.batch_repeat_interleave(2)
    with torch.no_grad():
        logits = [model(ids[:, at : at + 1].expand(2, -1), past_key_values=twin).logits for at in (10, 11)]
        torch.testing.assert_close(torch.cat(logits, 1)[:1], model(ids).logits[:, 10:], **TOLERANCE)


@torch.no_grad()
def test_what_a_static_cache_holds_stays_where_it_is(model):
    ids, cache = make_ids(2, 20), HybridCache(model.config, max_length=32)
    model.prefill(ids, past_key_values=cache)
    places, bytes_ = [tensor.data_ptr() for tensor in cache.tensors()], cache.nbytes()
    model.prefill(ids[:, :5], past_key_values=cache)
    for _ in range(4):
        model(ids[:, :1], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    model.prefill(ids, past_key_values=cache)
    assert places == [tensor.data_ptr() for tensor in cache.tensors()]
    assert cache.nbytes() == bytes_ == 2 * model.config.cache_bytes(32, dtype_bytes=4)


def test_a_reset_cache_is_like_new(model):
    cache, ids = HybridCache(model.config, max_length=8), make_ids(2, 11)
    first = generate(model, ids, past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(model, ids, past_key_values=cache), first)


def test_a_left_padded_batch_equals_singles_in_a_static_cache(model):
    rows = [make_ids(1, length, seed=length) for length in (1, 4, 2 * Q + 1)]
    ids, mask = left_pad(rows)
    together = generate(model, ids, attention_mask=mask, past_key_values=HybridCache(model.config, max_length=20))
    for index, row in enumerate(rows):
        assert torch.equal(together[index : index + 1], generate(model, row)), index


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_a_finished_row_changes_no_other_row(model, static):
    ids = torch.cat([make_ids(1, 5), make_ids(1, 5, seed=3)])
    free = generate(model, ids, tokens=12).tolist()
    end = next(token for token in free[0] if token not in free[1])
    cache = HybridCache(model.config, max_length=8 if static else None)
    stopped = generate(model, ids, tokens=12, eos_token_id=end, pad_token_id=9, past_key_values=cache).tolist()
    assert stopped[1] == free[1] and stopped[0][-1] == 9


@pytest.mark.parametrize("chunk", [None, 3], ids=["at once", "chunked prefill"])
def test_beams_in_a_static_cache(model, chunk):
    ids = make_ids(2, 9)
    options = dict(num_beams=3, num_return_sequences=2, prefill_chunk_size=chunk)
    cache = HybridCache(model.config, max_length=11)
    assert torch.equal(generate(model, ids, past_key_values=cache, **options), generate(model, ids, **options))


@pytest.mark.parametrize("room", [None, 4], ids=["growing", "static"])
@torch.no_grad()
def test_a_copy_goes_its_own_way(model, room):
    ids, cache = make_ids(2, 9), HybridCache(model.config, max_length=room)
    model.prefill(ids, past_key_values=cache)
    expected = model(torch.cat([ids, ids[:, :2]], dim=1)).logits[:, -1]
    question = cache.copy()
    generate(model, torch.cat([ids, make_ids(2, 3, seed=5)], dim=1), past_key_values=question)
    question.reset()
    assert question.get_seq_length() == 0 and cache.get_seq_length() == 9
    model(ids[:, :1], past_key_values=cache)
    torch.testing.assert_close(model(ids[:, 1:2], past_key_values=cache).logits[:, 0], expected, **TOLERANCE)


def test_generating_under_inference_mode_leaves_a_cache_that_can_be_continued(model):
    cache, ids = HybridCache(model.config, max_length=4), make_ids(1, 7)
    with torch.inference_mode():
        answer = generate(model, ids, past_key_values=cache)
    ids = torch.cat([ids, answer, make_ids(1, 2)], dim=1)
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))


# ---------------------------------------------------------------- long prompts


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", ["linear", "windowed"])
def test_reading_a_long_prompt_takes_no_larger_tensors(make_model, kind, monkeypatch):
    """Of a model without attention; no chunk size is asked for."""
    monkeypatch.setattr(modeling, "PREFILL_CHUNK", 128)
    model, largest = make_model(kind, layer_types=["linear_attention"] * 3), []
    for length in (4 * modeling.PREFILL_CHUNK, 8 * modeling.PREFILL_CHUNK):
        with LargestTensor() as found:
            generate(model, make_ids(1, length), tokens=2)
        largest.append(found.bytes)
    assert largest[0] == largest[1]


def test_long_prompts_are_read_in_chunks_and_give_the_same(model, monkeypatch):
    ids, mask = left_pad([make_ids(1, 5 * Q + 3), make_ids(1, 4, seed=1)])
    expected = generate(model, ids, attention_mask=mask)
    monkeypatch.setattr(modeling, "PREFILL_CHUNK", Q)
    assert torch.equal(generate(model, ids, attention_mask=mask), expected)


# ---------------------------------------------------------------- streams


def frame(number):
    """Tokens (1, 8) and tiles of one frame: a word, a number, four slots, two words."""
    tiles = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(number))
    return torch.tensor([[5, 10 + number, *[IMAGE] * 4, 6, 7]]), tiles


@torch.no_grad()
def test_a_stream_read_frame_by_frame_equals_the_whole(model):
    frames, question = [frame(number) for number in range(5)], make_ids(1, 3)
    cache, sizes = None, []
    for ids, tiles in frames:
        cache = model.prefill(ids, pixel_values=tiles, past_key_values=cache)
        sizes.append(cache.nbytes())
    whole = model(torch.cat([ids for ids, _ in frames] + [question], 1), pixel_values=torch.cat([t for _, t in frames]))
    torch.testing.assert_close(model(question, past_key_values=cache).logits, whole.logits[:, -3:], **TOLERANCE)
    if "full_attention" not in model.config.layer_types:
        assert len(set(sizes)) == 1


def test_questions_about_a_stream_leave_no_trace_in_it(model):
    ids, tiles, cache = torch.zeros(1, 0, dtype=torch.long), [], HybridCache(model.config)
    for number in range(3):
        new, pixels = frame(number)
        ids, tiles = torch.cat([ids, new], dim=1), [*tiles, pixels]
        model.prefill(new, pixel_values=pixels, past_key_values=cache)
        asked = torch.cat([ids, make_ids(1, 4, seed=number)], dim=1)
        answer = generate(model, asked, past_key_values=cache.copy())
        assert torch.equal(answer, generate(model, asked, pixel_values=torch.cat(tiles)))


# ---------------------------------------------------------------- CUDA graphs


def replayed_on_the_cpu(monkeypatch):
    """Steps are prepared as for a graph, only that a replay computes again."""

    class Replay:
        def __init__(self, graph):
            self.graph = graph

        def replay(self):
            self.graph.logits = self.graph._step()

    monkeypatch.setattr(modeling.HybridVLForCausalLM, "_graph_refusal", lambda *_: None)
    monkeypatch.setattr(graphs.DecodeGraph, "_record", lambda graph: setattr(graph, "graph", Replay(graph)))

@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where steps are replayed; on the CPU the same code runs around steps that are computed again."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    else:
        replayed_on_the_cpu(monkeypatch)
    return request.param


GRAPH = dict(tokens=20, cuda_graph=True)


def graphs_of(model):
    cache, _ = modeling._GRAPH_CACHES[model]
    return cache.graphs


def test_graphs_give_the_tokens_of_single_steps(model, device):
    model, ids = model.to(device), make_ids(2, 9).to(device)
    expected = generate(model, ids, tokens=20, cuda_graph=False)
    assert torch.equal(generate(model, ids, **GRAPH), expected)
    assert len(graphs_of(model)) == 1


def test_a_graph_is_captured_once(model, device):
    model, kept = model.to(device), set()
    for length in (9, 3, 14):
        ids = make_ids(2, length).to(device)
        assert torch.equal(generate(model, ids, **GRAPH), generate(model, ids, tokens=20, cuda_graph=False))
        kept.update(map(id, graphs_of(model).values()))
    assert len(kept) == 1
    # Other weights are not those that the graph reads.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    assert torch.equal(generate(model, ids, **GRAPH), generate(model, ids, tokens=20, cuda_graph=False))
    assert not kept & set(map(id, graphs_of(model).values()))


def test_graphs_of_a_left_padded_batch(model, device):
    model = model.to(device)
    ids, mask = (t.to(device) for t in left_pad([make_ids(1, length, seed=length) for length in (1, 4, 2 * Q + 1)]))
    expected = generate(model, ids, tokens=20, attention_mask=mask, cuda_graph=False)
    assert torch.equal(generate(model, ids, attention_mask=mask, **GRAPH), expected)


def test_graphs_follow_a_conversation_in_a_cache_that_grows(model, device):
    model, ids = model.to(device), make_ids(1, 5).to(device)
    cache = HybridCache(model.config, max_length=16)
    for turn in range(3):
        answer = generate(model, ids, past_key_values=cache, **GRAPH)
        assert torch.equal(answer, generate(model, ids, tokens=20, cuda_graph=False)), turn
        ids = torch.cat([ids, answer, make_ids(1, turn + 1, seed=turn).to(device)], dim=1)
    assert cache.get_seq_length() == ids.shape[1] - 3 - 1 and cache.graphs


def test_graphs_go_with_sampling_penalties_and_stopping(model, device):
    model, ids = model.to(device), make_ids(2, 5).to(device)
    options = dict(max_new_tokens=20, do_sample=True, top_k=8, repetition_penalty=1.3, eos_token_id=11, pad_token_id=0)

    def sample(graph):
        torch.manual_seed(0)
        return model.generate(ids, cuda_graph=graph, **options)

    assert torch.equal(sample(True), sample(False))


def test_graphs_with_positions_that_scale(make_model, device):
    """Beyond the trained length every token changes all frequencies."""
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}
    model, ids = make_model("hybrid", rope_parameters=rope, max_position_embeddings=8), make_ids(2, 5)
    model, ids = model.to(device), ids.to(device)
    assert torch.equal(generate(model, ids, **GRAPH), generate(model, ids, tokens=20, cuda_graph=False))


def test_a_model_with_graphs_can_be_copied_and_forgotten(make_model, device):
    model, ids = make_model("hybrid").to(device), make_ids(1, 5).to(device)
    answer = generate(model, ids, **GRAPH)
    other, last = copy.deepcopy(model), weakref.ref(model)
    del model
    gc.collect()
    assert last() is None
    assert torch.equal(generate(other, ids, tokens=20), answer)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_gives_the_logits_of_single_steps(model, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, ids = model.to("cuda", dtype), make_ids(2, 60).to("cuda")
    plain, graphed = (HybridCache(model.config, max_length=128) for _ in range(2))
    with torch.no_grad():
        for cache in (plain, graphed):
            model.prefill(ids[:, :40], past_key_values=cache)
        graphed.cuda_graph = True
        for token in ids[:, 40:].split(1, dim=1):
            expected, found = (model(token, past_key_values=cache).logits.float() for cache in (plain, graphed))
            assert (found - expected).norm() / expected.norm() < (1e-4 if dtype == torch.float32 else 0.05)
    assert [graph.graph is not None for graph in graphed.graphs.values()] == [True]


def test_a_step_that_can_not_be_captured_is_taken_without(make_model, caplog, monkeypatch):
    def fail(graph):
        graph._step()
        raise RuntimeError("operation not permitted when stream is capturing\nsomewhere")

    replayed_on_the_cpu(monkeypatch)
    monkeypatch.setattr(graphs.DecodeGraph, "_record", fail)
    model, ids = make_model("hybrid"), make_ids(2, 5)
    expected = generate(model, ids, tokens=20, cuda_graph=False)
    for _ in range(2):
        assert torch.equal(generate(model, ids, **GRAPH), expected)
    said = [record.message for record in caplog.records if "captured" in record.message]
    assert graphs.was_refused(model) and len(said) == 1 and "not permitted when stream is capturing);" in said[0]


def test_asking_for_graphs_in_vain_is_said_once(make_model, caplog, monkeypatch):
    monkeypatch.setattr("xtuner_ext.modeling.graphs.refuse.__defaults__", (set(),))
    model, ids = make_model("hybrid"), make_ids(1, 5)
    expected = generate(model, ids)
    for _ in range(2):
        assert torch.equal(generate(model, ids, cuda_graph=True), expected)
    said = [record.message for record in caplog.records if "graph" in record.message]
    assert said == ["no CUDA graph: the model is not on one GPU; decoding without"]
