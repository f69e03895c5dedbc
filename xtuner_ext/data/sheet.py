"""Tiles of a sample as one picture, from the very numbers that the model gets."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..modeling.processing import NORMALISATION

# Tiles are enlarged to this many pixels, so that their numbers can be read.
SMALLEST = 112
BORDER, GAP = 3, 12  # pixels
PAPER, TILE, THUMBNAIL = "white", (40, 110, 220), (230, 120, 0)


def contact_sheet(pixel_values, groups, normalisation):
    """Draw tiles, framed and numbered, every image or row of frames below the one before.

    Args:
        pixel_values (Tensor): Normalised tiles, (T, 3, S, S).
        groups (list[tuple[int, int, bool]]): Of every image its number of tiles, how many of them make a row, and
            whether the last is its thumbnail, which is framed in another colour and stands right of the others.
        normalisation (str): The processor's.

    Returns:
        PIL.Image.Image: RGB.
    """
    tiles = [_picture(tile) for tile in _bytes(pixel_values, normalisation)]
    side = tiles[0].width + 2 * BORDER
    places, top, first = [], GAP, 0
    for count, columns, has_thumbnail in groups:
        shown = count - has_thumbnail
        for number in range(shown):
            places.append((GAP + number % columns * side, top + number // columns * side, TILE))
        if has_thumbnail:
            places.append((2 * GAP + columns * side, top, THUMBNAIL))
        top, first = top + -(-shown // columns) * side + GAP, first + count
    sheet = Image.new("RGB", (max(left for left, _, _ in places) + side + GAP, top), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(10, side // 16))
    for number, (tile, (left, upper, colour)) in enumerate(zip(tiles, places, strict=True)):
        sheet.paste(tile, (left + BORDER, upper + BORDER))
        draw.rectangle((left, upper, left + side - 1, upper + side - 1), outline=colour, width=BORDER)
        label = f"{number} thumbnail" if colour == THUMBNAIL else str(number)
        corner = left + BORDER, upper + BORDER
        draw.rectangle(draw.textbbox(corner, label, font), fill=PAPER)
        draw.text(corner, label, colour, font)
    return sheet


def _bytes(pixel_values, normalisation):
    """ndarray: (T, S, S, 3), uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION[normalisation])
    return ((pixel_values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _picture(tile):
    factor = -(-SMALLEST // len(tile))
    return Image.fromarray(np.repeat(np.repeat(tile, factor, 0), factor, 1))
