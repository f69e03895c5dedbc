"""Images and text to model inputs: dynamic tiling or one square, normalisation, image placeholders.

Tiling is InternVL's: the grid whose aspect ratio is closest, plus a thumbnail when there are several tiles.
LLaVA takes one square of an image, padded or cropped.
"""

import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from transformers import AutoTokenizer, BatchFeature

IMAGE_PLACEHOLDER = "<image>"
IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
NORMALISATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def tile_grid(width, height, tile_size, min_tiles=1, max_tiles=12):
    """Choose the grid of tiles for an image.

    Args:
        width (int): Image width in pixels.
        height (int): Image height in pixels.
        tile_size (int): Side of a tile in pixels.
        min_tiles (int): Fewest tiles.
        max_tiles (int): Most tiles, thumbnail not counted.

    Returns:
        tuple[int, int]: Columns and rows.
    """
    grids = {
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    }
    best, best_distance = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        distance = abs(width / height - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and width * height > 0.5 * tile_size**2 * columns * rows:
            # On a tie only an image with enough pixels earns the larger grid.
            best = (columns, rows)
    return best


def count_tiles(width, height, tile_size, min_tiles=1, max_tiles=12, use_thumbnail=True):
    """int: Tiles that :func:`split_tiles` cuts an image of this size into."""
    columns, rows = tile_grid(width, height, tile_size, min_tiles, max_tiles)
    return columns * rows + (use_thumbnail and columns * rows > 1)


def split_tiles(image, tile_size, min_tiles=1, max_tiles=12, use_thumbnail=True):
    """Cut an image into square tiles.

    It is resized by torch's antialiased bicubic kernel on bytes, as transformers' default image processors do: several
    times faster than Pillow's, from which few values differ, by 1 to 4 of 255.

    Args:
        image (PIL.Image.Image): RGB image.
        tile_size (int): Side of a tile in pixels.
        min_tiles (int): Fewest tiles.
        max_tiles (int): Most tiles, thumbnail not counted.
        use_thumbnail (bool): Append the whole image as one tile when there are several.

    Returns:
        list[Tensor]: uint8 (3, S, S), views of the resized image in row-major order.
    """
    columns, rows = tile_grid(*image.size, tile_size, min_tiles, max_tiles)
    pixels = _pixels(image)
    resized = _resize(pixels, tile_size * rows, tile_size * columns)
    tiles = [tile for strip in resized.split(tile_size, dim=1) for tile in strip.split(tile_size, dim=2)]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(_resize(pixels, tile_size, tile_size))
    return tiles


def _pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _resize(pixels, height, width):
    return F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]


def pad_square(image, size, colour):
    """Pad an image to a square and resize it.

    Args:
        image (PIL.Image.Image): RGB image, kept in the middle.
        size (int): Side of the result in pixels.
        colour (tuple[int, int, int]): RGB of what is added.

    Returns:
        PIL.Image.Image: The square.
    """
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def crop_square(image, size):
    """Resize an image by its shorter edge and cut the middle out.

    Args:
        image (PIL.Image.Image): RGB image.
        size (int): Side of the result in pixels.

    Returns:
        PIL.Image.Image: The square.
    """
    short = min(image.size)
    width, height = (int(size * edge / short) for edge in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


class HybridVLProcessor:
    """Turns images and text into what ``HybridVLForCausalLM`` takes.

    Args:
        tokenizer (PreTrainedTokenizerBase): Tokenizer that knows the image tokens below.
        image_size (int): Side of a tile in pixels.
        tokens_per_tile (int): Visual tokens of one tile; 0 for a text model.
        min_tiles (int): Fewest tiles of an image.
        max_tiles (int): Most tiles of an image, thumbnail not counted; 1 switches tiling off.
        use_thumbnail (bool): Append the whole image when it was cut.
        normalisation (str): ``imagenet``, ``clip`` or ``siglip``.
        fit (str): ``tiles`` cuts an image, ``pad`` and ``crop`` make one square of it.
        image_start (str): Token before an image, or nothing.
        image_context (str): Token that every visual vector replaces.
        image_end (str): Token after an image, or nothing.
    """

    config_name = "processor_config.json"
    # Not a ProcessorMixin: that would need an image processor class and files of its own for these settings.
    _auto_class = None

    def __init__(
        self,
        tokenizer=None,
        image_size=448,
        tokens_per_tile=256,
        min_tiles=1,
        max_tiles=12,
        use_thumbnail=True,
        normalisation="imagenet",
        fit="tiles",
        image_start=IMAGE_START,
        image_context=IMAGE_CONTEXT,
        image_end=IMAGE_END,
    ):
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.tokens_per_tile = tokens_per_tile
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.use_thumbnail = use_thumbnail
        self.normalisation = normalisation
        if fit not in ("tiles", "pad", "crop"):
            raise ValueError(f"unknown fit {fit!r}, expected tiles, pad or crop")
        self.fit = fit
        self.image_start, self.image_context, self.image_end = image_start, image_context, image_end

    @property
    def settings(self):
        """dict: Everything but the tokenizer, as written to ``processor_config.json``."""
        return {key: value for key, value in vars(self).items() if key != "tokenizer"}

    def tile_limit(self, images, max_tiles=None):
        """int: Tiles that one of several images of a prompt may have; they share the limit of one."""
        return max(1, (self.max_tiles if max_tiles is None else max_tiles) // max(1, images))

    def tiles(self, image, max_tiles=None):
        """Cut or square and normalise one image.

        Args:
            image (PIL.Image.Image): Any mode; EXIF rotation is applied, transparency shows white.
            max_tiles (int, optional): Overrides the processor's own limit.

        Returns:
            Tensor: (T, 3, S, S), fp32.
        """
        image, (mean, std) = to_rgb(image), NORMALISATION[self.normalisation]
        if self.fit == "tiles":
            limit = self.max_tiles if max_tiles is None else max_tiles
            tiles = split_tiles(image, self.image_size, self.min_tiles, limit, self.use_thumbnail)
        else:
            size, colour = self.image_size, tuple(int(255 * value) for value in mean)
            square = crop_square(image, size) if self.fit == "crop" else pad_square(image, size, colour)
            tiles = [_pixels(square)]
        # Bytes become floats as late as can be, tile by tile while they are in the CPU's cache.
        pixels = torch.empty(len(tiles), 3, self.image_size, self.image_size)
        mean, std = (torch.tensor(values).mul(255).view(3, 1, 1) for values in (mean, std))
        for row, tile in zip(pixels, tiles):
            row.copy_(tile).sub_(mean).div_(std)
        return pixels

    def tile_count(self, image, max_tiles=None):
        """Count the tiles that :meth:`tiles` makes, without decoding the image where its header is enough.

        Args:
            image (PIL.Image.Image): Opened, not necessarily loaded.
            max_tiles (int, optional): Overrides the processor's own limit.

        Returns:
            int: T.
        """
        if self.fit != "tiles":
            return 1
        limit = self.max_tiles if max_tiles is None else max_tiles
        upright, turned = (
            count_tiles(*size, self.image_size, self.min_tiles, limit, self.use_thumbnail)
            for size in (image.size, image.size[::-1])
        )
        # Asked only where it matters: a PNG may tell its rotation after the pixels, which are then decoded.
        if upright != turned and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            return turned
        return upright

    def expand(self, text, tile_counts, tokens_per_tile=None):
        """Replace every ``<image>`` by the tokens of its tiles.

        Args:
            text (str): Text with as many ``<image>`` as images.
            tile_counts (list[int]): Tiles per image.
            tokens_per_tile (int, optional): Stand for a tile instead of all that it has.

        Returns:
            str: Text ready for the tokenizer.

        Raises:
            ValueError: When placeholders and images differ in number, or the model takes no images.
        """
        if tile_counts and not self.tokens_per_tile:
            raise ValueError("this model has no image front end, but images were passed")
        parts = text.split(IMAGE_PLACEHOLDER)
        if len(parts) - 1 != len(tile_counts):
            raise ValueError(f"the text has {len(parts) - 1} {IMAGE_PLACEHOLDER} placeholders for {len(tile_counts)} images")
        pieces = [parts[0]]
        for count, part in zip(tile_counts, parts[1:]):
            context = self.image_context * (count * (tokens_per_tile or self.tokens_per_tile))
            pieces += [self.image_start, context, self.image_end, part]
        return "".join(pieces)

    def __call__(self, text, images=None, padding=True, padding_side="left", add_special_tokens=True):
        """Prepare a batch for generation.

        Args:
            text (str | list[str]): Rendered prompts with ``<image>`` placeholders.
            images (list, optional): Images of all prompts in reading order, or one list per prompt.
            padding (bool): Pad to the longest prompt.
            padding_side (str): ``left`` for generation.
            add_special_tokens (bool): Let the tokenizer add its own, such as a beginning-of-sequence token.

        Returns:
            BatchFeature: ``input_ids``, ``attention_mask`` and, with images, ``pixel_values`` (T, 3, S, S).
        """
        texts = [text] if isinstance(text, str) else list(text)
        per_text = _group_images(texts, images)
        pixels, expanded = [], []
        for prompt, group in zip(texts, per_text):
            limit = self.tile_limit(len(group))
            tiles = [self.tiles(image, limit) for image in group]
            expanded.append(self.expand(prompt, [len(t) for t in tiles]))
            pixels += tiles
        data = dict(
            self.tokenizer(
                expanded,
                return_tensors="pt",
                padding=padding,
                padding_side=padding_side,
                add_special_tokens=add_special_tokens,
                return_token_type_ids=False,
            )
        )
        if pixels:
            data["pixel_values"] = torch.cat(pixels)
        return BatchFeature(data)

    def apply_chat_template(self, conversation, **kwargs):
        """Render messages with the tokenizer's chat template; see transformers."""
        return self.tokenizer.apply_chat_template(conversation, **kwargs)

    def decode(self, *args, **kwargs):
        """Tokenizer's ``decode``."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        """Tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def save_pretrained(self, folder):
        """Write ``processor_config.json`` and the tokenizer."""
        os.makedirs(folder, exist_ok=True)
        settings = {"processor_class": type(self).__name__, **self.settings}
        with open(os.path.join(folder, self.config_name), "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """Note the Auto class that loaded this one; called by transformers."""
        cls._auto_class = auto_class

    @classmethod
    def from_pretrained(cls, folder, tokenizer=None, **kwargs):
        """Read what :meth:`save_pretrained` wrote.

        Args:
            folder (str): Local folder.
            tokenizer (PreTrainedTokenizerBase, optional): Taken instead of the folder's own.
            **kwargs: Passed to ``AutoTokenizer.from_pretrained``.
        """
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
        with open(os.path.join(folder, cls.config_name), encoding="utf-8") as file:
            settings = json.load(file)
        known = {key: settings[key] for key in cls().settings if key in settings}
        return cls(tokenizer=tokenizer, **known)


def to_rgb(image):
    """Apply EXIF rotation and flatten any mode to RGB over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 256).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _group_images(texts, images):
    images = list(images or [])
    if images and isinstance(images[0], (list, tuple)):
        if len(images) != len(texts):
            raise ValueError(f"there are {len(images)} lists of images for {len(texts)} prompts")
        return images
    counts = [text.count(IMAGE_PLACEHOLDER) for text in texts]
    if sum(counts) != len(images):
        raise ValueError(f"the text has {sum(counts)} {IMAGE_PLACEHOLDER} placeholders for {len(images)} images")
    groups, start = [], 0
    for count in counts:
        groups.append(images[start : start + count])
        start += count
    return groups
