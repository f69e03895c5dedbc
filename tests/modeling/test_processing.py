"""Images to tiles, placeholders to tokens, and the folder that is written."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xtuner_ext.modeling.processing import NORMALISATION, HybridVLProcessor, count_tiles, split_tiles, tile_grid, to_rgb

SPECIAL = ["<pad>", "<unk>", "<img>", "<IMG_CONTEXT>", "</img>"]
WORDS = ["what", "is", "this", "and"]


@pytest.fixture
def processor():
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[2:],
    )
    return HybridVLProcessor(fast, image_size=16, tokens_per_tile=4, max_tiles=6)


def colour(value, size=(32, 32), mode="RGB"):
    return Image.new(mode, size, value)


# ---------------------------------------------------------------- tiling

LIMITS = (1, 2, 4, 6, 12, 18, 24)
GRIDS = {
    (448, 448): [(1, 1)] * 7,
    (300, 300): [(1, 1)] * 7,
    (640, 480): [(1, 1), (1, 1), (1, 1), (3, 2), (4, 3), (4, 3), (4, 3)],
    (480, 640): [(1, 1), (1, 2), (1, 2), (2, 3), (3, 4), (3, 4), (3, 4)],
    (800, 600): [(1, 1), (1, 1), (2, 2), (3, 2), (4, 3), (4, 3), (4, 3)],
    (1920, 1080): [(1, 1), (2, 1), (2, 1), (2, 1), (4, 2), (5, 3), (5, 3)],
    (1024, 1024): [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (3, 3), (3, 3)],
    (2000, 2000): [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (4, 4), (4, 4)],
    (100, 1000): [(1, 1), (1, 2), (1, 4), (1, 6), (1, 10), (1, 10), (1, 10)],
    (1344, 896): [(1, 1), (2, 1), (2, 2), (3, 2), (3, 2), (3, 2), (3, 2)],
    (1240, 1754): [(1, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (2, 3)],
}


@pytest.mark.parametrize("size", GRIDS, ids=lambda size: f"{size[0]}x{size[1]}")
def test_grid_is_the_one_InternVL_chooses(size):
    found = [tile_grid(*size, tile_size=448, max_tiles=limit) for limit in LIMITS]
    assert dict(zip(LIMITS, found)) == dict(zip(LIMITS, GRIDS[size]))


@pytest.mark.parametrize("size", GRIDS, ids=lambda size: f"{size[0]}x{size[1]}")
def test_as_many_tiles_are_counted_and_made_as_the_grid_says(size):
    """The whole image comes on top where there are several."""
    wanted = [columns * rows + (columns * rows > 1) for columns, rows in GRIDS[size]]
    assert [count_tiles(*size, tile_size=448, max_tiles=limit) for limit in LIMITS] == wanted
    image, processor = colour("red", size), HybridVLProcessor()
    assert [processor.tile_count(image, limit) for limit in LIMITS] == wanted
    assert [len(processor.tiles(image, limit)) for limit in LIMITS[:4]] == wanted[:4]


def test_fewest_tiles_are_respected():
    columns, rows = tile_grid(448, 448, tile_size=448, min_tiles=3, max_tiles=6)
    assert columns * rows >= 3


def test_tiles_are_cut_row_by_row_and_the_thumbnail_is_last():
    """Four coloured quarters come back as four plain tiles."""
    image = Image.new("RGB", (64, 64))
    colours = ["red", "lime", "blue", "white"]
    for index, name in enumerate(colours):
        image.paste(Image.new("RGB", (32, 32), name), (32 * (index % 2), 32 * (index // 2)))
    tiles = split_tiles(image, 16, max_tiles=4)
    assert len(tiles) == 5 and all(tile.shape == (3, 16, 16) and tile.dtype == torch.uint8 for tile in tiles)
    for tile, name in zip(tiles, colours):
        assert tuple(tile[:, 4, 4].tolist()) == Image.new("RGB", (1, 1), name).getpixel((0, 0))
    thumbnail = tiles[-1]
    assert [thumbnail[:, 2, x].tolist() for x in (2, 13)] == [[255, 0, 0], [0, 255, 0]]


@pytest.mark.parametrize(
    "size, options, count",
    [
        ((64, 32), {}, 3),
        ((64, 32), {"use_thumbnail": False}, 2),
        ((16, 16), {}, 1),
        ((64, 32), {"max_tiles": 1}, 1),
    ],
    ids=["with thumbnail", "without", "one tile needs none", "tiling off"],
)
def test_thumbnail_comes_with_several_tiles_only(size, options, count):
    assert len(split_tiles(colour("red", size), 16, **{"max_tiles": 2, **options})) == count


@pytest.fixture(scope="module")
def photo():
    import skimage.data

    return Image.fromarray(skimage.data.astronaut())


SIZES = [(640, 480), (300, 900), (1500, 1000), (448, 448), (37, 50), (2, 2)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_tiles_are_those_of_transformers(photo, size):
    """Its own processor for this tiling, to the bit; Pillow's arithmetic is rarely a few steps of 255 away."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    image = photo.resize(size)
    mean, std = NORMALISATION["imagenet"]
    options = dict(crop_to_patches=True, size={"height": 448, "width": 448}, image_mean=list(mean), image_std=list(std))
    found = HybridVLProcessor().tiles(image)
    theirs = GotOcr2ImageProcessor(**options)(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)
    pillow = GotOcr2ImageProcessorPil(**options)(images=[image], return_tensors="pt")["pixel_values"]
    steps = ((found - pillow) * torch.tensor(std).view(3, 1, 1) * 255).abs()
    assert steps.max() < 5 and steps.mean() < 0.05


def test_tiles_are_normalised_channels_first(processor):
    tiles = processor.tiles(colour((255, 0, 51)), max_tiles=1)
    assert tiles.shape == (1, 3, 16, 16) and tiles.dtype == torch.float32
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(tiles[0, :, 5, 5], expected)


@pytest.mark.parametrize("name, value", [("clip", (1 - 0.48145466) / 0.26862954), ("siglip", 1.0)])
def test_normalisation_goes_by_name(name, value):
    tiles = HybridVLProcessor(image_size=16, normalisation=name).tiles(colour("white"), max_tiles=1)
    torch.testing.assert_close(tiles[0, 0, 0, 0].item(), value)


@pytest.mark.parametrize(
    "fit, rows", [("pad", ["background", "red", "background"]), ("crop", ["red", "red", "red"])], ids=["pad", "crop"]
)
def test_one_square_of_a_wide_image(fit, rows):
    processor = HybridVLProcessor(image_size=16, normalisation="clip", fit=fit)
    tiles = processor.tiles(colour("red", (64, 16)), max_tiles=6)
    assert tiles.shape == (1, 3, 16, 16)
    # The background is CLIP's mean colour, which is nothing once normalised.
    found = ["red" if tiles[0, 0, row, 8] > 1 else "background" for row in (1, 8, 14)]
    assert found == rows and (fit == "crop" or tiles[0, :, 1].abs().max() < 0.02)


def test_unknown_fit_is_named():
    with pytest.raises(ValueError, match="unknown fit 'stretch', expected tiles, pad or crop"):
        HybridVLProcessor(fit="stretch")


# ---------------------------------------------------------------- colour


def palette(transparent=None):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


MODES = {
    "palette": (palette(), [(10, 20, 30), (200, 100, 50)]),
    "palette with a transparent entry": (palette(transparent=1), [(10, 20, 30), (255, 255, 255)]),
    "CMYK": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [(255, 0, 0)]),
    "transparent": (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), [(255, 255, 255)]),
    "half transparent": (Image.new("RGBA", (1, 1), (255, 0, 0, 127)), [(255, 128, 128)]),
    "grey with alpha": (Image.new("LA", (1, 1), (0, 0)), [(255, 255, 255)]),
    "grey": (Image.new("L", (1, 1), 77), [(77, 77, 77)]),
    "black and white": (Image.new("1", (1, 1), 1), [(255, 255, 255)]),
    "RGB": (Image.new("RGB", (1, 1), (1, 2, 3)), [(1, 2, 3)]),
}


@pytest.mark.parametrize("image, pixels", MODES.values(), ids=MODES.keys())
def test_any_mode_becomes_rgb_over_white(image, pixels):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert [rgb.getpixel((x, 0)) for x in range(rgb.width)] == pixels


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bit_grey_keeps_its_shades(mode):
    values = np.array([[0, 65535, 32768, 257]], dtype=np.uint16 if mode == "I;16" else np.int32)
    image = Image.fromarray(values)
    assert image.mode == mode
    assert [to_rgb(image).getpixel((x, 0))[1] for x in range(4)] == [0, 255, 128, 1]


def test_16_bit_png_from_a_file():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 32768]], dtype=np.uint16)).save(file, "PNG")
    assert to_rgb(Image.open(file)).getpixel((1, 0)) == (128, 128, 128)


def test_exif_rotation_is_applied():
    image, file = Image.new("RGB", (24, 8)), io.BytesIO()
    image.paste("white", (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image.save(file, "JPEG", exif=exif)
    rgb = to_rgb(Image.open(file))
    assert rgb.size == (8, 24)
    assert rgb.getpixel((4, 2))[0] > 200 and rgb.getpixel((4, 20))[0] < 50


# ---------------------------------------------------------------- text


def test_placeholders_become_the_tokens_of_their_tiles(processor):
    text = processor.expand("a <image> b <image>", [1, 3])
    context = "<IMG_CONTEXT>"
    assert text == f"a <img>{context * 4}</img> b <img>{context * 12}</img>"


@pytest.mark.parametrize(
    "text, counts, message",
    [
        ("a <image> b", [], "the text has 1 <image> placeholders for 0 images"),
        ("a", [2], "the text has 0 <image> placeholders for 1 images"),
        ("<image><image>", [1], "the text has 2 <image> placeholders for 1 images"),
    ],
    ids=["no image", "no placeholder", "one of two"],
)
def test_placeholders_must_match_images(processor, text, counts, message):
    with pytest.raises(ValueError, match=message):
        processor.expand(text, counts)
    with pytest.raises(ValueError, match=message):
        processor(text, images=[colour("red")] * len(counts))


def test_batch_is_left_padded_and_tiles_follow_reading_order(processor):
    images = [colour("white", (32, 16)), colour("black", (16, 16)), colour("white", (16, 16))]
    processor.max_tiles = 4
    batch = processor(["what <image> and <image>", "this <image>", "is"], images=images)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    slots = (batch["input_ids"] == SPECIAL.index("<IMG_CONTEXT>")).sum(1).tolist()
    assert slots == [4 * (3 + 1), 4, 0]
    assert batch["pixel_values"].shape == (5, 3, 16, 16)
    assert [bool((tile > 0).all()) for tile in batch["pixel_values"]] == [True, True, True, False, True]
    assert batch["input_ids"][2].tolist()[:-1] == [0] * (batch["input_ids"].shape[1] - 1)
    assert batch["attention_mask"].sum(1).tolist()[2] == 1


def test_images_may_be_given_per_prompt(processor):
    images = [colour("white", (16, 16)), colour("black", (16, 16))]
    flat = processor(["<image> this", "<image> is"], images=images)
    nested = processor(["<image> this", "<image> is"], images=[images[:1], images[1:]])
    assert torch.equal(flat["input_ids"], nested["input_ids"])
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])


def test_images_per_prompt_need_one_list_each(processor):
    with pytest.raises(ValueError, match="1 lists of images for 2 prompts"):
        processor(["<image> this", "<image> is"], images=[[colour("white")]])


def test_text_alone_has_no_pixels(processor):
    assert set(processor("what is this")) == {"input_ids", "attention_mask"}


# ---------------------------------------------------------------- folder


def test_save_and_load_round_trip(processor, tmp_path):
    processor.max_tiles, processor.use_thumbnail, processor.normalisation = 3, False, "clip"
    processor.fit, processor.image_start, processor.image_end = "pad", "", ""
    processor.save_pretrained(tmp_path)
    loaded = HybridVLProcessor.from_pretrained(tmp_path)
    assert loaded.settings == processor.settings
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written["processor_class"] == "HybridVLProcessor" and written["max_tiles"] == 3
    image = colour("red", (48, 16))
    ours, theirs = (p("what <image>", images=[image]) for p in (processor, loaded))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert loaded.batch_decode(theirs["input_ids"][:, :1]) == ["what"]
