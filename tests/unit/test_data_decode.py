"""Pixels: the same as open_clip's own preprocessing gives, within a stated bound."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_factory import encode_image, make_image

import zsr  # noqa: F401  # before torchvision, which cannot be imported beside CPU torch without it
from zsr.data import decode as decode_module
from zsr.data.decode import decode, read_label, resize_crop


def reference(data: bytes, image_size: int) -> np.ndarray:
    """uint8 [3, S, S] by open_clip's evaluation transform, up to its normalisation."""
    from open_clip.transform import image_transform

    transform = image_transform(image_size, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return (transform(Image.open(io.BytesIO(data))) * 255).round().byte().numpy()


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (97, 101), (50, 61), (224, 300), (224, 224)])
def test_pixels_equal_open_clips_but_for_rounding(extension, shape):
    data = encode_image(make_image(sum(shape), *shape), extension)
    ours, theirs = decode({extension: data}, 224), reference(data, 224)
    assert ours.dtype == np.uint8
    assert ours.shape == (3, 224, 224)
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-4
    assert (difference > 0).mean() < 1e-2


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_any_shape_is_resized_as_torchvision_does(height, width, image_size):
    image = make_image(height * 100 + width, height, width)
    data = encode_image(image, "png")
    difference = resize_crop(image, image_size).transpose(2, 0, 1).astype(int) - reference(data, image_size).astype(int)
    assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("extension", ["png", "webp"])
def test_an_image_of_the_right_size_keeps_its_pixels(extension):
    image = make_image(1, 64, 64)
    assert (decode({extension: encode_image(image, extension)}, 64) == image.transpose(2, 0, 1)).all()


def test_pillow_alone_gives_the_same_jpeg_pixels(monkeypatch):
    data = encode_image(make_image(2, 90, 120), "jpg")
    fast = decode({"jpg": data}, 64)
    monkeypatch.setattr(decode_module, "simplejpeg", None)
    assert np.abs(decode({"jpg": data}, 64).astype(int) - fast).max() <= 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_modes(mode):
    image = Image.fromarray(make_image(3, 40, 50)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    expected = np.asarray(Image.open(buffer).convert("RGB")).astype(int)
    pixels = decode({"jpeg": buffer.getvalue()}, 40).transpose(1, 2, 0)
    assert np.abs(pixels - expected[:, 5:45]).max() <= 1


@pytest.mark.parametrize(("mode", "extension"), [("RGBA", "png"), ("RGBA", "webp"), ("LA", "png"), ("P", "png")])
def test_transparency_becomes_white(mode, extension):
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    image.paste((200, 200, 200, 255), (0, 0, 8, 4))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format=extension, lossless=True)
    pixels = decode({extension: buffer.getvalue()}, 8)
    assert (pixels[:, 4:] == 255).all()
    assert np.abs(pixels[:, :4].astype(int) - 200).max() <= 4  # the palette is coarse


def test_a_file_of_another_format_than_its_name_says_is_read_all_the_same():
    pixels = np.full((8, 8, 3), 200, dtype=np.uint8)
    for format in ("BMP", "PPM", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=format)
        assert (decode({"png": buffer.getvalue()}, 8) == 200).all()


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_broken_images_raise_a_sentence(extension, keep):
    data = encode_image(make_image(4, 64, 64), extension)
    with pytest.raises(ValueError, match=r"the image cannot be decoded: [^<]+$"):
        decode({extension: data[: int(keep * len(data)) if keep == 0.5 else keep]}, 32)


def test_parts_without_image_or_label():
    with pytest.raises(ValueError, match=r"no image among the parts \(cls, txt\); expected one of jpg"):
        decode({"cls": b"1", "txt": b""}, 8)
    assert read_label({"cls": b"12\n"}) == 12
    with pytest.raises(ValueError, match="no cls part"):
        read_label({"jpg": b""})
    with pytest.raises(ValueError, match="'cat' is not a number"):
        read_label({"cls": b"cat"})
