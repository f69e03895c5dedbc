"""An image stored as JPEG again."""

import numpy as np
from PIL import Image

from xtuner_ext.data.augment import jpeg_again


def test_quality_is_drawn_between_75_and_100(monkeypatch):
    qualities, save = [], Image.Image.save

    def note(self, *args, quality):
        qualities.append(quality)
        save(self, *args, quality=quality)

    monkeypatch.setattr(Image.Image, "save", note)
    rng = np.random.default_rng(0)
    for _ in range(400):
        jpeg_again(Image.new("L", (8, 8)), rng)
    assert set(qualities) == set(range(75, 101))


def test_pixels_change_little_and_the_size_and_what_is_up_do_not(tmp_path):
    ramp = np.linspace(0, 255, 96 * 64 * 3).reshape(96, 64, 3).astype(np.uint8)
    again = jpeg_again(Image.fromarray(ramp), np.random.default_rng(0))
    change = np.abs(np.asarray(again).astype(int) - ramp)
    assert again.size == (64, 96) and again.mode == "RGB" and 0 < change.max() < 20
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=turned)
    with Image.open(tmp_path / "turned.png") as image:
        again = jpeg_again(image, np.random.default_rng(0))
    assert again.size == (96, 64) and not again.getexif()
