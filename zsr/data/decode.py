"""From stored bytes to pixels: uint8, RGB, shorter side resized, centre cropped.

Pixels stay uint8 until they are on the device: converting to float and normalising costs half as much as decoding, and
four times the memory on the way. Normalisation is the model's business.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # an accelerator only: Pillow gives the same pixels at two thirds of the speed
    simplejpeg = None

JPEG = ("jpg", "jpeg")
EXTENSIONS = (*JPEG, "png", "webp")

# Pillow is asked for these first: some of its forty formats only know by trying, which takes longer than a small image does.
_USUAL = ("WEBP", "PNG", "JPEG")


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

    The geometry, roundings included, is that of torchvision's Resize and CenterCrop, which open_clip uses.
    """
    height, width = pixels_HWC.shape[:2]
    if (height, width) == (image_size, image_size):
        return pixels_HWC
    shorter = min(height, width)
    resized_height, resized_width = (int(image_size * side / shorter) for side in (height, width))
    top, left = round((resized_height - image_size) / 2), round((resized_width - image_size) / 2)
    resized = resize(pixels_HWC, resized_height, resized_width)
    return resized[top : top + image_size, left : left + image_size]


def resize(pixels_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, antialiased: uint8 [height, width, 3].

    One value in 200 differs from Pillow's by one, hardly any by two, none by more: torch, which does this four times as
    fast, keeps the filter's weights in 16 bits, Pillow in 32, and both round between two passes.
    """
    resized = torch.from_numpy(pixels_HWC).permute(2, 0, 1).unsqueeze(0)  # channels last, which has the fast path
    # Values are clipped between the two passes as well, so their order shows in noise. torch begins with the rows; so does
    # Pillow, but for tall images that shrink.
    columns_first = pixels_HWC.shape[0] > max(2 * pixels_HWC.shape[1], height)
    passes = [(height, pixels_HWC.shape[1])] * columns_first + [(height, width)]
    for size in passes:
        resized = F.interpolate(resized, size, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _decode_jpeg(data: bytes) -> np.ndarray:
    if simplejpeg is not None:
        try:
            # The exact DCT and chroma upsampling, as Pillow has them: the fast ones move pixels by several values.
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
        except ValueError:
            pass  # CMYK, or a warning that Pillow may judge harmless
    return _decode_pillow(data)


def _decode_pillow(data: bytes) -> np.ndarray:
    return np.array(open_rgb(data))  # a copy: torch takes no memory that it may not write


def open_rgb(data: bytes) -> Image.Image:
    """An image file's pixels by Pillow, in RGB.

    Raises:
        ValueError: they cannot be decoded.
    """
    try:
        with _open(data) as image:
            return to_rgb(image)
    except UnidentifiedImageError:  # its text is the address of a buffer
        raise ValueError("the image cannot be decoded: its format is not known") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image cannot be decoded: {error}") from None


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_USUAL)
    except UnidentifiedImageError:
        return Image.open(io.BytesIO(data))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, transparent parts on white (as paper, and as emoji and logos are meant to be seen)."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
