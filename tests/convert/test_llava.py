"""LLaVA-1.5 checkpoints of both kinds in and out, against transformers' own model."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.reference.vision_language import clip_preprocessor, write_json, write_llava, write_original_llava
from xtuner_ext.convert import llava, load_teacher
from xtuner_ext.convert.checkpoint import read_state
from xtuner_ext.convert.teacher import load_exactly, load_processor, teacher_family
from xtuner_ext.errors import UserError
from xtuner_ext.modeling import HybridVLForCausalLM

LAYOUTS = ["hub", "transformers", "nested-4", "nested-5"]
TOKENS = 16


@pytest.fixture
def tokenizer(digits):
    return str(digits / "tokenizer")


def assert_same_logits(found, expected):
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4


def inputs(model, images=(1, 1)):
    """Left-padded ids whose rows hold the given number of images, and their pixels."""
    generator = torch.Generator().manual_seed(0)
    image = model.config.image_token_id
    rows = []
    for count in images:
        words = torch.randint(20, image, (5 + 4 * count,), generator=generator).tolist()
        for number in range(count):
            words[2 + 4 * number : 2 + 4 * number] = [image] * TOKENS
        rows.append(words)
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    pixels = torch.randn(sum(images), 3, 16, 16, generator=generator) if sum(images) else None
    return ids, mask, pixels


@torch.no_grad()
def compare(folder, theirs, images):
    ids, mask, pixels = inputs(theirs, images)
    ours = load_teacher(folder)(ids, attention_mask=mask, pixel_values=pixels).logits
    expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    assert_same_logits(ours[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("images", [(0,), (1,), (1, 1), (2, 1, 0)], ids=["text", "one", "batch", "padded batch"])
def test_logits_equal_those_of_transformers(tmp_path, tokenizer, images):
    compare(tmp_path, write_llava(tmp_path, tokenizer), images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_and_is_written_back_bit_by_bit(tmp_path, tokenizer, layout):
    theirs = write_llava(tmp_path, tokenizer, layout)
    compare(tmp_path, theirs, (1, 1))
    original, raw = read_state(tmp_path), json.loads((tmp_path / "config.json").read_text())
    config = llava.model_config(raw, tmp_path / "config.json")
    back = llava.to_checkpoint(config, llava.to_model(config, original))
    assert config.key_layout == layout
    assert back.keys() == original.keys() and all(torch.equal(back[key], original[key]) for key in original)


@pytest.mark.parametrize("layer", [-1, -3, 2])
def test_selected_layer(tmp_path, tokenizer, layer):
    compare(tmp_path, write_llava(tmp_path, tokenizer, vision_feature_layer=layer), (1,))


def test_qwen2_decoder_with_a_shared_head(tmp_path, tokenizer):
    theirs = write_llava(tmp_path, tokenizer, family="qwen2")
    compare(tmp_path, theirs, (1, 1))
    assert load_teacher(tmp_path).config.template == "qwen_chat"


def test_a_sparse_config_means_its_classes_defaults(tmp_path, tokenizer):
    """Hub folders store only what differs from the defaults."""
    theirs = write_llava(tmp_path, tokenizer)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    for section, name in (("vision_config", "num_channels"), ("text_config", "head_dim")):
        del raw[section]["hidden_act"], raw[section][name]
    del raw["vision_feature_select_strategy"], raw["projector_hidden_act"], raw["text_config"]["model_type"]
    write_json(path, raw)
    compare(tmp_path, theirs, (1,))


@pytest.mark.parametrize("tower", ["own", "clip", "inside"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
def test_the_authors_layout_gives_the_same_logits(tmp_path, tokenizer, tower, pickled):
    theirs, original = write_original_llava(tmp_path, tokenizer, tower, pickled)
    compare(tmp_path, theirs, (1, 2))
    config = load_teacher(tmp_path).config
    assert (config.template, config.key_layout) == ("vicuna_v1", "original")
    back = llava.to_checkpoint(config, llava.to_model(config, read_state(tmp_path)))
    assert back.keys() == original.keys() and all(torch.equal(back[key], original[key]) for key in original)


def test_the_authors_tower_may_lie_anywhere(tmp_path, tokenizer):
    (tmp_path / "model").mkdir()
    theirs, _ = write_original_llava(tmp_path / "model", tokenizer, mm_vision_tower=str(tmp_path / "clip"))
    shutil.move(tmp_path / "model" / "openai" / "clip-tiny", tmp_path / "clip")
    compare(tmp_path / "model", theirs, (1,))


def test_published_7B_fits_exactly():
    """transformers' own structure gives names, shapes and count; one CLIP layer and a norm are never read."""
    raw = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": dict(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064),
        "vision_config": {
            "model_type": "clip_vision_model",
            **dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
            **dict(image_size=336, patch_size=14),
        },
    }
    with init_empty_weights():
        theirs = LlavaForConditionalGeneration(LlavaConfig.from_dict(copy.deepcopy(raw)))
        config = llava.model_config(raw)
        model = HybridVLForCausalLM(config)
    state = llava.to_model(config, theirs.state_dict())
    load_exactly(model, state, "checkpoint")
    unread = sum(tensor.numel() for key, tensor in state.items() if key.startswith("unread."))
    assert unread == 12_596_224 + 2 * 1024
    ours, all_of_them = (sum(p.numel() for p in network.parameters()) for network in (model, theirs))
    assert ours + unread == all_of_them == 7_063_427_072
    assert config.tokens_per_tile == 576


def test_only_the_structure_is_built_without_weights(tmp_path, tokenizer):
    write_original_llava(tmp_path, tokenizer)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    with init_empty_weights():
        model = load_teacher(tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())


# ---------------------------------------------------------------- processing


def picture(size=(37, 23)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(37, 23), (16, 50), (16, 16), (5, 9)], ids=str)
def test_cropped_pixels_equal_those_of_CLIPImageProcessor(tmp_path, tokenizer, size):
    write_llava(tmp_path, tokenizer)
    processor = load_processor(tmp_path)
    assert processor.fit == "crop"
    ours = processor.tiles(picture(size))
    fields = clip_preprocessor()
    exact = CLIPImageProcessorPil(**fields)(picture(size), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5)
    # torchvision rounds its interpolation differently, by a few of 255 steps.
    close = CLIPImageProcessor(**fields)(picture(size), return_tensors="pt")["pixel_values"]
    assert (ours - close).abs().max() < 4 / 255 / min(fields["image_std"])


@pytest.mark.parametrize("size", [(37, 23), (23, 37), (20, 20)], ids=str)
def test_padded_pixels_equal_those_of_the_authors(tmp_path, tokenizer, size):
    """A square of the mean colour around the picture, then CLIP's own processing."""
    write_original_llava(tmp_path, tokenizer)
    processor = load_processor(tmp_path)
    assert processor.fit == "pad"
    fields = clip_preprocessor()
    side = max(size)
    square = np.tile(np.array([int(255 * value) for value in fields["image_mean"]], np.uint8), (side, side, 1))
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    square[top : top + size[1], left : left + size[0]] = np.asarray(picture(size))
    expected = CLIPImageProcessorPil(**fields)(Image.fromarray(square), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor.tiles(picture(size)), expected, rtol=0, atol=1e-5)


def test_prompts_equal_those_of_LlavaProcessor(tmp_path, tokenizer):
    write_llava(tmp_path, tokenizer)
    processor = load_processor(tmp_path)
    theirs = LlavaProcessor(
        CLIPImageProcessorPil(**clip_preprocessor()),
        processor.tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    texts = ["USER: <image>\nWhat? ASSISTANT:", "<image> <image> so?"]
    images = [picture(), picture((20, 40)), picture()]
    ours = processor(texts, images=images)
    expected = theirs(text=texts, images=images, return_tensors="pt", padding=True)
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(ours[key], expected[key]), key
    torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-5)


def test_the_authors_tokenizer_gets_the_image_token(tmp_path, tokenizer):
    write_original_llava(tmp_path, tokenizer)
    processor, model = load_processor(tmp_path), load_teacher(tmp_path)
    batch = processor("USER: <image>\nWhat? ASSISTANT:", images=[picture()])
    assert (batch["input_ids"] == model.config.image_token_id).sum() == TOKENS == model.config.tokens_per_tile
    assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize(
    "changes, fit", [({"do_pad": True}, "pad"), ({"size": 16, "crop_size": 16}, "crop")], ids=["padding", "old style"]
)
def test_preprocessor_variants(tmp_path, tokenizer, changes, fit):
    write_llava(tmp_path, tokenizer)
    write_json(tmp_path / "preprocessor_config.json", {**clip_preprocessor(), **changes})
    assert load_processor(tmp_path).fit == fit


def test_a_folder_without_preprocessor_is_cropped_as_CLIP_does(tmp_path, tokenizer):
    write_llava(tmp_path, tokenizer, preprocessor=False)
    processor = load_processor(tmp_path)
    assert (processor.fit, processor.normalisation, processor.max_tiles) == ("crop", "clip", 1)


def test_preprocessor_inside_the_processors_file(tmp_path, tokenizer):
    write_llava(tmp_path, tokenizer, preprocessor=False)
    fields = {**clip_preprocessor(), "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(tmp_path / "processor_config.json", {"processor_class": "LlavaProcessor", "image_processor": fields})
    assert load_processor(tmp_path).normalisation == "siglip"


# ---------------------------------------------------------------- mistakes


def message_of(call, folder):
    with pytest.raises(UserError) as error:
        call(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(path, **changes):
    raw = json.loads(path.read_text())
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (raw[section] if section else raw)[field] = value
    write_json(path, raw)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(projector_hidden_act="relu"), "projector_hidden_act is 'relu', only 'gelu' is supported"),
        (dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy is 'full', only 'default'"),
        (dict(vision_feature_layer=[-2, -1]), "vision_feature_layer is [-2, -1], only one layer is supported"),
        (dict(vision_feature_layer=-5), "layer -5 of the vision tower is selected, which has 3 layers"),
        (dict(vision_config__model_type="siglip_vision_model"), "vision_config: model_type is 'siglip_vision_model'"),
        (dict(text_config__model_type="mistral"), "text_config.model_type is 'mistral', expected one of llama, qwen2"),
        (dict(image_token_index=9999), "image_token_index is 9999, expected one below text_config.vocab_size"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_unsupported_variants_are_named(tmp_path, tokenizer, changes, expected):
    write_llava(tmp_path, tokenizer)
    edit(tmp_path / "config.json", **changes)
    for call in (load_teacher, load_processor):
        text = message_of(call, tmp_path)
        assert text.startswith(f"{tmp_path / 'config.json'}: ") and expected in text


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(mm_projector_type="linear"), "mm_projector_type is 'linear', only 'mlp2x_gelu' is supported"),
        (dict(mm_use_im_start_end=True), "mm_use_im_start_end is True, only False is supported"),
        (dict(image_aspect_ratio="anyres"), "image_aspect_ratio is 'anyres', expected 'pad' or 'square'"),
        (dict(mm_vision_select_feature="cls_patch"), "mm_vision_select_feature is 'cls_patch', only 'patch'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_unsupported_variants_of_the_authors_are_named(tmp_path, tokenizer, changes, expected):
    write_original_llava(tmp_path, tokenizer, **changes)
    assert expected in message_of(load_teacher, tmp_path)


def test_a_missing_tower_folder_says_what_to_put_where(tmp_path, tokenizer):
    write_original_llava(tmp_path, tokenizer)
    shutil.rmtree(tmp_path / "openai")
    for call in (load_teacher, load_processor):
        text = message_of(call, tmp_path)
        assert "mm_vision_tower is 'openai/clip-tiny', which is no local folder: put that CLIP model" in text
        assert text.endswith(f"into {tmp_path / 'openai' / 'clip-tiny'}")


def test_a_missing_field_is_named(tmp_path, tokenizer):
    write_llava(tmp_path, tokenizer)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["text_config"]
    write_json(tmp_path / "config.json", raw)
    assert message_of(load_teacher, tmp_path) == f"{tmp_path / 'config.json'}: text_config is missing"


def test_missing_and_surplus_tensors_are_named(tmp_path, tokenizer):
    write_llava(tmp_path, tokenizer)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    save_file({**state, "multi_modal_projector.linear_3.weight": torch.zeros(1)}, path)
    assert "unknown, the first is multi_modal_projector.linear_3.weight" in message_of(load_teacher, tmp_path)
    save_file({key: t for key, t in state.items() if "pre_layrnorm.bias" not in key}, path)
    assert "1 tensors are missing, the first is vision.tower.pre_layrnorm.bias" in message_of(load_teacher, tmp_path)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(size={"shortest_edge": 32}), "size is {'shortest_edge': 32}, expected {'shortest_edge': 16}"),
        (dict(crop_size={"height": 8, "width": 8}), "crop_size is {'height': 8, 'width': 8}, expected"),
        (dict(image_mean=[0.1, 0.2, 0.3]), "is none of the known normalisations: imagenet, clip, siglip"),
        (dict(do_center_crop=False), "do_center_crop is False, only True is supported"),
        (dict(resample=2), "resample is 2, only 3 is supported"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_other_image_processing_is_named(tmp_path, tokenizer, changes, expected):
    write_llava(tmp_path, tokenizer)
    edit(tmp_path / "preprocessor_config.json", **changes)
    text = message_of(load_processor, tmp_path)
    assert text.startswith(str(tmp_path / "preprocessor_config.json")) and expected in text


def test_a_tokenizer_that_disagrees_is_named(tmp_path, tokenizer):
    write_llava(tmp_path, tokenizer)
    edit(tmp_path / "config.json", image_token_index=7)
    assert "gives <image> the id" in message_of(load_processor, tmp_path)


def test_a_damaged_pickle_is_named(tmp_path, tokenizer):
    write_original_llava(tmp_path, tokenizer, pickled=True)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:200])
    assert message_of(load_teacher, tmp_path).startswith(f"{path} is not a readable file of weights")


def test_families_do_not_shadow_each_other(tmp_path, tokenizer):
    write_llava(tmp_path, tokenizer)
    assert teacher_family(tmp_path) is llava
