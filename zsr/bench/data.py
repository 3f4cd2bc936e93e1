"""What preparing an image costs, against open_clip's pipeline of Pillow and torchvision, in CPU time of one core.

Ours ends in uint8 pixels in a batch, since converting them to floats is the device's work; theirs ends in normalised floats.
So that nothing is hidden in that difference, a row has ours with the conversion done here as well.

Shapes: B images, 3 colours, H and W pixels.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from zsr.bench.compare import Spread
from zsr.data.decode import EXTENSIONS, decode, decode_whole, resize, resize_crop
from zsr.data.shards import ShardSet

BAR = 1.5
"""Least ratio of images/s, whole pipeline."""
PIXEL_BOUND = 2
"""Largest difference of a pixel value (of 255) from theirs."""
SHARE_BOUND = 0.01
"""Largest share of values that differ at all."""

WHOLE, WITH_FLOATS = "whole pipeline", "whole pipeline, to floats here"
_SIZE = 224
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP

Parts = dict[str, bytes]


@dataclass(frozen=True)
class Row:
    """One stage, in images per second and core; ratio is ours over theirs, from runs one after the other."""

    stage: str
    images_per_s: Spread
    their_images_per_s: Spread
    ratio: Spread


@dataclass(frozen=True)
class Pixels:
    """How far our pixels are from theirs: the largest difference, and the share of values that differ."""

    largest: int
    share: float

    @property
    def in_bounds(self) -> bool:
        return self.largest <= PIXEL_BOUND and self.share <= SHARE_BOUND


def natural_jpeg(number: int, height: int = 375, width: int = 500) -> bytes:
    """A JPEG like a photograph to a decoder: noise whose spectrum falls with frequency as that of natural scenes does, its
    colours correlated, quality 90, chroma halved; some 120 kB, ImageNet's being 110 on average.
    """
    rng = np.random.default_rng(number)
    falling = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    falling[0, 0] = 1 / width

    def layer() -> np.ndarray:
        noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) / falling).real
        return noise / noise.std()

    shared = layer()
    colours = np.stack([shared + 0.4 * layer() for _ in range(3)], axis=-1)
    pixels_HWC = np.clip(46 * colours + 120, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def take_images(address: str | None, count: int) -> list[Parts]:
    """Images of a set, spread over it, or made-up ones.

    Raises:
        ValueError: there is no such set.
    """
    if address is None:
        return [{"jpg": natural_jpeg(number)} for number in range(count)]
    shards = ShardSet(address)
    chosen = np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int)
    return [shards.read(number).parts for number in chosen.tolist()]


def measure(
    images: Sequence[Parts], repeats: int = 7, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Row], Pixels]:
    """Time every stage of both, in turns, on one thread of this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(images, repeats, progress)
    finally:
        torch.set_num_threads(threads)


def _measure(
    images: Sequence[Parts], repeats: int, progress: Callable[[int, int], None] | None
) -> tuple[list[Row], Pixels]:
    from open_clip.transform import image_transform
    from torchvision.transforms import CenterCrop, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop, Resize

    bicubic = InterpolationMode.BICUBIC
    theirs = image_transform(_SIZE, is_train=False, mean=_MEAN, std=_STD)
    unscaled = image_transform(_SIZE, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    crop_theirs, centre = Resize(_SIZE, interpolation=bicubic), CenterCrop(_SIZE)
    augment_theirs = RandomResizedCrop(_SIZE, scale=(0.9, 1.0), interpolation=bicubic)
    flip = RandomHorizontalFlip()
    files = [next(parts[extension] for extension in EXTENSIONS if extension in parts) for parts in images]
    decoded = [np.ascontiguousarray(decode_whole(parts)) for parts in images]
    pictures = [_open(file) for file in files]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (_MEAN, _STD))
    everything = range(len(images))

    def ours_whole() -> torch.Tensor:
        image_BCHW = np.empty((len(images), 3, _SIZE, _SIZE), dtype=np.uint8)
        for place, parts in enumerate(images):
            image_BCHW[place] = decode(parts, _SIZE)
        return torch.from_numpy(image_BCHW)

    def theirs_whole() -> torch.Tensor:
        return torch.stack([theirs(_open(file)) for file in files])

    rng = np.random.default_rng(0)
    stages: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "decode": (lambda: [decode_whole(parts) for parts in images], lambda: [_open(file) for file in files]),
        "crop and resize": (
            lambda: [resize_crop(decoded[n], _SIZE) for n in everything],
            lambda: [centre(crop_theirs(pictures[n])) for n in everything],
        ),
        "augment (random crop, resize, flip)": (
            lambda: [_augment(decoded[n], rng) for n in everything],
            lambda: [flip(augment_theirs(pictures[n])) for n in everything],
        ),
        WHOLE: (ours_whole, theirs_whole),
        WITH_FLOATS: (lambda: ours_whole().float().div_(255).sub_(mean).div_(std), theirs_whole),
    }
    spent: dict[str, tuple[list[float], list[float]]] = {stage: ([], []) for stage in stages}
    for done in range(repeats + 1):
        for stage, sides in stages.items():
            for side in (0, 1):
                began = time.process_time()
                sides[side]()
                if done:  # the first round warms up
                    spent[stage][side].append(time.process_time() - began)
        if progress is not None:
            progress(done, repeats)
    rows = []
    for stage, (ours, other) in spent.items():
        rate, their_rate = (Spread.of([len(images) / seconds for seconds in times]) for times in (ours, other))
        rows.append(Row(stage, rate, their_rate, Spread.of([b / a for a, b in zip(ours, other)])))
    their_pixels = torch.stack([unscaled(_open(file)) for file in files]).mul(255).round().int()
    difference = (ours_whole().int() - their_pixels).abs()
    return rows, Pixels(int(difference.max()), float((difference > 0).float().mean()))


def cores_for(rate: float, images_per_s: float) -> int:
    """Cores that prepare ``rate`` images a second, one giving ``images_per_s``."""
    return max(1, int(np.ceil(rate / images_per_s)))


def _augment(pixels_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """open_clip's training crop in our way: 90 to 100 % of the area, sides 3:4 to 4:3, perhaps mirrored. zsr's recipes do
    not augment; this says what it would cost."""
    height, width = pixels_HWC.shape[:2]
    area, ratio = height * width * rng.uniform(0.9, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    box_width, box_height = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    top, left = rng.integers(0, height - box_height + 1), rng.integers(0, width - box_width + 1)
    crop = resize(pixels_HWC[top : top + box_height, left : left + box_width], _SIZE, _SIZE)
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def _open(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")
