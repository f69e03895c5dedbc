"""Random changes of training images."""

import io

from PIL import Image

from ..modeling.processing import to_rgb

QUALITY = (75, 100)


def jpeg_again(image, rng):
    """Store an image as JPEG of a random quality and read it again, as InternVL's ``data_augment`` does.

    InternVL does so with each tile; here it is done once, before an image is cut.

    Args:
        image (PIL.Image.Image): Any mode.
        rng (np.random.Generator): Draws the quality, from 75 to 100.

    Returns:
        PIL.Image.Image: Upright RGB image of the same size.
    """
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "JPEG", quality=int(rng.integers(QUALITY[0], QUALITY[1] + 1)))
    again = Image.open(buffer)
    again.load()
    return again
