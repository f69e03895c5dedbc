"""A stream of pictures, read one by one by students of the shipped teacher, questions in between."""

import pytest
import torch
from PIL import Image

from xtuner_ext.convert import load_teacher
from xtuner_ext.convert.seeding import Seeding, first_token_states, seed_mixer
from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.modeling import Attention, HybridCache, HybridVLConfig, HybridVLForCausalLM, layer_types_from_attention

MIXER = dict(qk_norm="l2", use_rope=True, gate_bias=True, window=16, sink=True)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits-teacher", torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return load_processor("digits-teacher")


@pytest.fixture(params=["linear", "hybrid"])
def student(request, teacher):
    """The teacher with its attention replaced, mixers seeded from it and not trained."""
    layers = teacher.config.num_hidden_layers
    types = layer_types_from_attention(list(range(0, layers, 4)) if request.param == "hybrid" else [], layers)
    changes = {"layer_types": types, "mixer": {**teacher.config.mixer, **MIXER}}
    model = HybridVLForCausalLM(HybridVLConfig.from_dict({**teacher.config.to_dict(), **changes})).eval()
    model.load_state_dict(teacher.state_dict(), strict=False)
    first = first_token_states(teacher, teacher.config.bos_token_id)
    for index, (layer, old) in enumerate(zip(model.model.layers, teacher.model.layers)):
        if not isinstance(layer.mixer, Attention):
            seed_mixer(layer.mixer, old.mixer, Seeding(), torch.Generator().manual_seed(index), first[index])
    return model


def frames(processor, count):
    """Token ids and tiles of pictures that come one after another."""
    for number in range(count):
        picture = Image.effect_noise((40 + 8 * number, 32), 80).convert("RGB")
        yield processor(f"Frame{number}: <image>\n", images=[picture], add_special_tokens=number == 0)


@torch.no_grad()
def test_pictures_appended_one_by_one_equal_the_whole_conversation(student, processor):
    read, cache, sizes = [], HybridCache(student.config), []
    question = processor("Is there a 7?", add_special_tokens=False)["input_ids"]
    for number, frame in enumerate(frames(processor, 5)):
        read.append(frame)
        student.prefill(frame["input_ids"], pixel_values=frame["pixel_values"], past_key_values=cache)
        sizes.append(cache.nbytes())
        # A question after every other picture, read from a copy.
        ids = torch.cat([*(f["input_ids"] for f in read), question], dim=1)
        tiles = torch.cat([f["pixel_values"] for f in read])
        whole = student(ids, pixel_values=tiles).logits[:, -question.shape[1] :]
        if number % 2:
            asked = cache.copy()
            logits = student(question, past_key_values=asked).logits
            torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)
            answer = student.generate(ids, past_key_values=cache.copy(), max_new_tokens=5, do_sample=False)
            assert torch.equal(answer, student.generate(ids, pixel_values=tiles, max_new_tokens=5, do_sample=False))
    torch.testing.assert_close(student(question, past_key_values=cache).logits, whole, rtol=1e-3, atol=1e-3)
    if "full_attention" not in student.config.layer_types:
        assert len(set(sizes)) == 1
