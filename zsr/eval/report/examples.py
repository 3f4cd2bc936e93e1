"""Example images beside the cards: clean, the perturbation made visible, attacked, and what the model says of each.

Shapes: N samples, H x W pixels, 3 channels.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zsr.eval.card import ResultCard
from zsr.eval.report.grid import Row, family_of, group, set_label

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
_NEEDED = ("clean", "attacked", "label", "clean_pred", "attacked_pred", "class_names")


@dataclass(frozen=True)
class Sample:
    """One image, three pictures of it."""

    clean: Pixels
    perturbation: Pixels
    """Amplified, around grey."""
    attacked: Pixels
    truth: str
    clean_says: str
    attacked_says: str

    @property
    def clean_right(self) -> bool:
        return self.clean_says == self.truth

    @property
    def attacked_right(self) -> bool:
        return self.attacked_says == self.truth


@dataclass(frozen=True)
class Examples:
    """Some samples of one row on one set."""

    row: Row
    set_label: str
    card: ResultCard
    factor: int
    """What the perturbation was multiplied with."""
    samples: list[Sample]


def find_examples(places: Iterable[Path]) -> dict[str, Path]:
    """Files of examples by card id, in these folders and beside these files."""
    folders = dict.fromkeys(place.parent if place.is_file() else place for place in places)
    return {
        path.name.removesuffix(".examples.npz"): path
        for folder in folders
        for path in sorted(folder.rglob("*.examples.npz"))
    }


def pick_examples(
    cards: Sequence[ResultCard], files: Mapping[str, Path], rows: Sequence[Row], row_of: Mapping[str, str],
    *, each: int = 3, total: int = 48,
) -> tuple[list[Examples], int]:  # fmt: skip
    """A few samples for each row and set; and how many pairs had to be left out.

    Budgets compare only within an attack and a norm: of the attack that most pairs have, the card with the largest budget.

    Raises:
        ValueError: a file of examples cannot be read.
    """
    having = [card for card in cards if card.id in files and card.attack]
    by_pair = group(having, lambda card: f"{row_of[card.id]} {card.dataset.key} {card.dataset.split}")
    place = {row.key: number for number, row in enumerate(rows)}
    common = Counter(family for found in by_pair.values() for family in dict.fromkeys(map(_family, found)))
    picked = [
        max(found, key=lambda card: (common[_family(card)], _family(card), _eps(card))) for found in by_pair.values()
    ]
    picked.sort(key=lambda card: (card.dataset.key, card.dataset.split, place[row_of[card.id]]))
    room = total // each
    step = max(1.0, len(picked) / room)  # spread over all of them, not the first sets alone
    kept = [picked[int(number * step)] for number in range(min(room, len(picked)))]
    by_key = {row.key: row for row in rows}
    made = [load_examples(files[card.id], card, by_key[row_of[card.id]], each) for card in kept]
    return [one for one in made if one.samples], len(picked) - len(kept)


def _family(card: ResultCard) -> str:
    assert card.attack is not None
    return f"{card.attack.norm} {family_of(card.attack)}"  # linf comes after l2, so it wins where both are as common


def _eps(card: ResultCard) -> float:
    assert card.attack is not None
    return card.attack.eps


def load_examples(path: Path, card: ResultCard, row: Row, most: int) -> Examples:
    """Read a card's examples.

    Raises:
        ValueError: the file is not what the evaluation writes.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in _NEEDED}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no example images ({error}); delete it, or measure its card again") from None
    clean_NHWC = found["clean"][:most].astype(np.float32) / 255
    attacked_NHWC = found["attacked"][:most].astype(np.float32)
    diff_NHWC = attacked_NHWC - clean_NHWC
    largest = float(np.abs(diff_NHWC).max(initial=0))
    factor = max(1, int(0.5 / largest)) if largest > 0 else 1
    names = [str(name) for name in found["class_names"]]
    samples = [
        Sample(
            clean=_bytes(clean_NHWC[place]),
            perturbation=_bytes(0.5 + factor * diff_NHWC[place]),
            attacked=_bytes(attacked_NHWC[place]),
            truth=names[int(found["label"][place])],
            clean_says=names[int(found["clean_pred"][place])],
            attacked_says=names[int(found["attacked_pred"][place])],
        )
        for place in range(len(clean_NHWC))
    ]
    return Examples(row, set_label(card.dataset), card, factor, samples)


def png(image_HWC: Pixels, least: int = 128) -> bytes:
    """An image as PNG; a small one enlarged pixel by pixel, since browsers would blur what is to be seen."""
    image = Image.fromarray(image_HWC)
    times = -(-least // image.width) if image.width < least else 1
    out = io.BytesIO()
    image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST).save(
        out, format="PNG", optimize=True
    )
    return out.getvalue()


def strip(examples: Examples) -> bytes:
    """The pictures of some samples in one PNG: a line a sample; clean, perturbation, attacked."""
    gap = 6
    lines = [
        np.pad(
            np.concatenate(
                [np.pad(part, ((0, 0), (0, gap), (0, 0)), constant_values=255)
                 for part in (sample.clean, sample.perturbation, sample.attacked)], axis=1,
            ),
            ((0, gap), (0, 0), (0, 0)), constant_values=255,
        )
        for sample in examples.samples
    ]  # fmt: skip
    return png(np.concatenate(lines)[:-gap, :-gap], least=390)


def _bytes(image_HWC: np.ndarray[Any, np.dtype[np.float32]]) -> Pixels:
    return np.clip(image_HWC * 255 + 0.5, 0, 255).astype(np.uint8)
