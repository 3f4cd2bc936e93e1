"""From stored bytes to pixels: uint8, RGB, shorter side resized, centre cropped.

Pixels stay uint8 until they are on the device: converting to float and normalising costs half as much as decoding, and
four times the memory on the way. Normalisation is the model's business.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # an accelerator only: Pillow gives the same pixels at two thirds of the speed
    simplejpeg = None

JPEG = ("jpg", "jpeg")
EXTENSIONS = (*JPEG, "png", "webp")


def decode(parts: Mapping[str, bytes], image_size: int) -> np.ndarray:
    """Pixels of a sample.

    Args:
        parts: bytes by extension; the first of ``EXTENSIONS`` found is the image.
        image_size: side of the square result, in pixels.

    Returns:
        uint8 [3, image_size, image_size]. An image that has this size already keeps its pixels as they are.

    Raises:
        ValueError: there is no image part, or its bytes cannot be decoded.
    """
    return np.ascontiguousarray(resize_crop(decode_whole(parts), image_size).transpose(2, 0, 1))


def decode_whole(parts: Mapping[str, bytes]) -> np.ndarray:
    """The image among the parts as it was stored: uint8 [height, width, 3].

    Raises:
        ValueError: as ``decode``.
    """
    for extension in EXTENSIONS:
        if extension in parts:
            return _decode_jpeg(parts[extension]) if extension in JPEG else _decode_pillow(parts[extension])
    found = ", ".join(sorted(parts)) or "none"
    raise ValueError(f"no image among the parts ({found}); expected one of {', '.join(EXTENSIONS)}")


def read_label(parts: Mapping[str, bytes]) -> int:
    """The class number in the "cls" part.

    Raises:
        ValueError: there is none, or it is not a number.
    """
    if "cls" not in parts:
        raise ValueError("no label: the sample has no cls part")
    try:
        return int(parts["cls"])
    except ValueError:
        raise ValueError(f"the label {parts['cls'][:20]!r} is not a number") from None


def resize_crop(pixels_HWC: np.ndarray, image_size: int) -> np.ndarray:
    """Shorter side to ``image_size`` (bicubic, antialiased), then the central square: uint8 HWC.

    The geometry, roundings included, is that of torchvision's Resize and CenterCrop, which open_clip uses: a value
    differs from theirs by at most two (by more than one only in black and white noise), and nearly always not at all.
    """
    height, width = pixels_HWC.shape[:2]
    if (height, width) == (image_size, image_size):
        return pixels_HWC
    shorter = min(height, width)
    resized_height, resized_width = (int(image_size * side / shorter) for side in (height, width))
    top, left = round((resized_height - image_size) / 2), round((resized_width - image_size) / 2)
    image, bicubic = Image.fromarray(pixels_HWC), Image.Resampling.BICUBIC
    if shorter < image_size or width < height:
        resized = np.asarray(image.resize((resized_width, resized_height), bicubic))
        return resized[top : top + image_size, left : left + image_size]
    # Only the pixels inside the crop, which is a quarter faster. Pillow resizes in two passes, rounds and clips between
    # them and chooses their order by cost; for wide images that shrink, the crop leaves that choice as it is.
    step_y, step_x = height / resized_height, width / resized_width
    right, bottom = min((left + image_size) * step_x, width), min((top + image_size) * step_y, height)
    box = (left * step_x, top * step_y, right, bottom)
    return np.asarray(image.resize((image_size, image_size), bicubic, box=box))


def _decode_jpeg(data: bytes) -> np.ndarray:
    if simplejpeg is not None:
        try:
            # The exact DCT and chroma upsampling, as Pillow has them: the fast ones move pixels by several values.
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
        except ValueError:
            pass  # CMYK, or a warning that Pillow may judge harmless
    return _decode_pillow(data)


def _decode_pillow(data: bytes) -> np.ndarray:
    return np.asarray(open_rgb(data))


def open_rgb(data: bytes) -> Image.Image:
    """An image file's pixels by Pillow, in RGB.

    Raises:
        ValueError: they cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)
    except UnidentifiedImageError:  # its text is the address of a buffer
        raise ValueError("the image cannot be decoded: its format is not known") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image cannot be decoded: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, transparent parts on white (as paper, and as emoji and logos are meant to be seen)."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
