"""Sentences and short forms that all formats of a report share."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zsr.eval.card import ResultCard
from zsr.eval.report.grid import Cell, Sheet

READING = (
    "Clean is the share of images that are classified right as they are. Robust is the share that is right as it is and still "
    "right after the attack: an upper bound on what a stronger attack would leave.",
    "In brackets stands the 95 % Wilson interval, which covers the choice of images alone, not that of seeds or of the "
    "training run; that of a mean over classes follows from each class's own count. Two numbers may be compared if they stand "
    "in one column; two columns differ in images, prompts, resolution or attack, so their numbers may not.",
    "Bold is the best of a column and everything whose interval overlaps the best's, that is, cannot be told from it by "
    "intervals. No bold: no row can be told from the best.",
)
OBLIVIOUS = "the attack does not know the defence; an attack that does leaves less, often nothing"
COST = (
    "Probes are counted in, clean predictions once for each set. The bare model's card and that of an attack which does not "
    "know the defence may come from one run of the attack; each then bears its part. Cards that do not say what they share, as "
    "older ones, are counted whole."
)
_COUNTED = 3


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def interval(cell: Cell) -> str:
    """Of 95 %, in brackets."""
    return f"({percent(cell.low)}-{percent(cell.high)})"


def spread(cell: Cell) -> str:
    """Of several cards in one cell; empty for one."""
    if cell.spread is None:
        return ""
    seeds = len(cell.seeds)
    return f"+-{percent(cell.spread)}, {f'{seeds} seeds' if seeds == cell.num_cards else f'{cell.num_cards} cards'}"


def points(delta: float | None) -> str:
    """A difference in percentage points; empty for none."""
    return "" if delta is None else f"{100 * delta:+.1f}"


def protocol_lines(sheet: Sheet) -> list[tuple[str, str]]:
    """How a sheet's numbers were measured."""
    protocol = sheet.protocol
    metrics = sorted({card.protocol.metric.replace("_", " ") for card in sheet.cards})
    where = {"model": "the size that the model reads", "native": "the set's own size", "224": "224 pixels"}
    return [
        ("protocol", protocol.suite or "none: sets named one by one"),
        ("metric", ", ".join(metrics)),
        ("epsilon applies at", where[protocol.resolution]),
        ("preprocessing", protocol.preprocessing),
        ("normalization", protocol.normalization),
        ("precision", protocol.precision),
        ("cards", str(len(sheet.cards))),
    ]


def legend_lines(sheets: Sequence[Sheet]) -> list[str]:
    """What the marks in these sheets' cells mean, of those that occur."""
    blocks = [block for sheet in sheets for block in sheet.blocks]
    cells = [cell for block in blocks for leaf in block.leaves for cell in leaf.cells.values()]
    lines = []
    if any(block.oblivious for block in blocks):
        lines.append(f"o: {OBLIVIOUS}.")
    if any(cell.spread is not None for cell in cells):
        lines.append("+-: mean and standard deviation over several cards; the brackets span all their intervals.")
    if any(cell.delta is not None for cell in cells):
        lines.append("A signed number is the difference to the baseline in percentage points.")
    return lines


def summary(cards: Sequence[ResultCard]) -> str:
    """What was measured, in a sentence."""
    counts = {
        "model": len({card.model.weights_digest for card in cards}),
        "set": len({(card.dataset.key, card.dataset.split) for card in cards}),
        "attack": len(
            {(card.attack.title, card.attack.knowledge, card.attack.crafted_on) for card in cards if card.attack}
        ),
        "budget": len({(card.attack.norm, card.attack.eps) for card in cards if card.attack}),
    }
    defenses = sorted({card.defense.name for card in cards if card.defense})
    words = ", ".join(f"{number} {name}{'s' * (number != 1)}" for name, number in counts.items())
    measured = sum(card.dataset.samples for card in cards)
    behind = f"with and without {', '.join(defenses)}" if defenses else "no defence"
    return f"{words}; {behind}; {measured} images in all cards."


def versions(cards: Sequence[ResultCard]) -> list[tuple[str, str]]:
    """Every version that took part, by what it is a version of."""
    names = list(dict.fromkeys(name for card in cards for name in card.environment))
    found = {name: sorted({card.environment[name] for card in cards if name in card.environment}) for name in names}
    found = {
        name: [re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", one) for one in values]
        for name, values in found.items()
    }
    return [(name, ", ".join(values[:_COUNTED]) + (f" and {len(values) - _COUNTED} more" if len(values) > _COUNTED else ""))
            for name, values in found.items()]  # fmt: skip


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def amount(number: float) -> str:
    """A count that is easy to read: 12.3 k, 4.5 M."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
