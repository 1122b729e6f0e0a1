"""Reading of a photograph as upright 8-bit RGB."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from largebatch.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTOMETRIC, BITS, WHITE_IS_ZERO = 262, 258, 0  # tags of TIFF


def pillow() -> Any:
    """Import Pillow.

    Raises:
        UserError: if it is not installed, with the command that installs it.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise UserError(
            "data.name: image_folder reads photographs with Pillow, which is not installed: "
            "pip install 'largebatch[vision]'"
        ) from error
    return PIL.Image


def read_image(file: Path) -> Image:
    """Return an image file as RGB, completely decoded; of several images in a file, the first one.

    The image is rotated by its EXIF orientation. 16-bit grey is scaled to 8 bits such that white remains white, transparent
    pixels are composited onto white, and CMYK is converted to RGB by Pillow's formula, without a colour profile.

    Raises:
        UserError: naming the file, if it cannot be read, or if its white level is unknown (floats, 32-bit integers).
    """
    module = pillow()
    try:
        with module.open(file) as image:
            image.load()
            with suppress(Exception):  # the photograph may be intact even if its EXIF data are broken
                import_module("PIL.ImageOps").exif_transpose(image, in_place=True)
            return _as_rgb(image)
    except MemoryError:
        raise
    # The decoder may raise any exception for a broken file: struct.error, IndexError, SyntaxError (a PNG) and others.
    except Exception as error:
        raise UserError(
            f"image '{file}' cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error


def _as_rgb(image: Image) -> Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _eight_bits(image).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind}, which have no white of their own; save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("LA") if image.mode == "La" else image
        clear = image.convert("RGBA")
        paper = pillow().new("RGBA", clear.size, "white")
        paper.alpha_composite(clear)
        return paper.convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image) -> Image:
    """Scale 16-bit grey (in some TIFFs fewer bits) to 8 bits, white to white; Pillow would clip all values above 255."""
    tags = getattr(image, "tag_v2", {})
    white = 2 ** tags.get(BITS, (16,))[0] - 1
    values = np.asarray(image)
    grey = values.astype(np.float32) * (255.0 / white)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255.0 - grey
    if isinstance(clear := image.info.get("transparency"), int):  # one grey of a PNG is transparent
        grey[values == clear] = 255.0
    return pillow().fromarray(grey.round().clip(0, 255).astype(np.uint8))
