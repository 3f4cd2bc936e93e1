"""How far each stage of an attack got, and what the measurements cost: plots, and the rows of the cost table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from zsr.eval.card import Cost, ResultCard
from zsr.eval.report.grid import Block, Row, Sheet, clean_key, group
from zsr.eval.report.style import Looks, Plot, finish, frame, handle, legend, panels, set_title, some


@dataclass(frozen=True)
class CostLine:
    """What a row's cards took together: what several cards repeat is counted once, what rows share is split."""

    row: Row
    cards: int
    samples: int
    seconds: float
    encoder_passes: int
    images_per_s: tuple[float, float]
    """Slowest and fastest card."""
    devices: str


def cost_lines(cards: Sequence[ResultCard], rows: Sequence[Row], row_of: Mapping[str, str]) -> list[CostLine]:
    """The cost table, in the order of the rows."""
    own = group(cards, lambda card: row_of[card.id])
    lines = []
    for row in rows:
        found = own[row.key]
        costs = [card.cost for card in found]
        speeds = [card.cost.images_per_s for card in found]
        devices = dict.fromkeys(
            card.cost.device + (f" x {card.cost.workers}" if card.cost.workers > 1 else "") for card in found
        )
        lines.append(
            CostLine(
                row,
                len(found),
                sum(card.dataset.samples for card in found),
                _clean_once(found, lambda cost: cost.clean_seconds)
                + sum(_own(cost.seconds - cost.clean_seconds, cost) + cost.probe_seconds for cost in costs),
                round(
                    _clean_once(found, lambda cost: cost.clean_passes)
                    + sum(_own(cost.encoder_passes - cost.clean_passes, cost) + cost.probe_passes for cost in costs)
                ),
                (min(speeds), max(speeds)),
                ", ".join(devices),
            )
        )
    return lines


def _own(amount: float, cost: Cost) -> float:
    """A card's part of its attack's run."""
    return amount / cost.shared_by


def _clean_once(cards: Sequence[ResultCard], part: Callable[[Cost], float]) -> float:
    """The clean predictions of each set, which the cards of all its attacks repeat."""
    sets = group(cards, lambda card: f"{clean_key(card)} {card.seed if card.defense else 0}")
    return sum(max(part(card.cost) for card in found) for found in sets.values())


def cost_plot(lines: Sequence[CostLine], looks: Looks) -> Plot:
    """Time, and encoder passes for each image measured, of each row."""
    figure, axes_list = panels(2, 4.2, 0.24 * len(lines) + 0.9)
    unit, divisor = ("hours", 3600) if max(line.seconds for line in lines) > 5400 else ("minutes", 60)
    amounts = (
        (f"time, {unit}", [line.seconds / divisor for line in lines]),
        ("encoder passes an image", [line.encoder_passes / line.samples for line in lines]),
    )
    for axes, (label, values) in zip(axes_list, amounts):
        colors = [looks[line.row.key].color for line in lines]
        axes.barh(range(len(lines)), values, color=colors, height=0.7)
        axes.set_yticks(range(len(lines)), [line.row.label for line in lines])
        axes.set(xlabel=label, ylim=(len(lines) - 0.4, -0.6))
        frame(axes, grid="x")
    set_title(figure, "Cost, all cards of a row together")
    said = [f"{line.row.label} {line.seconds / divisor:.1f} {unit}" for line in lines]
    return finish(figure, "cost", "Cost", f"Cost of each row's cards together: {some(said)}.")


def survivors(sheet: Sheet, block: Block, looks: Looks, row_of: Mapping[str, str], name: str) -> Plot | None:
    """The share still right after each stage of the attack, a panel for each set."""
    staged = [card for card in sheet.cards if card.attack and len(card.survivors) > 1]
    shown = []
    for column in block.columns:
        cards = [card for card in staged if card.column == column.key]
        if cards:
            shown.append((column, cards))
    if not shown:
        return None
    figure, axes_list = panels(len(shown), 3.4 if len(shown) > 1 else 6.4, 2.7 if len(shown) > 1 else 3.8)
    drawn = set()
    said = []
    for axes, (column, cards) in zip(axes_list, shown):
        stages = ["clean", *dict.fromkeys(stage for card in cards for stage in card.survivors)]
        for card in cards:
            look = looks[row_of[card.id]]
            drawn.add(row_of[card.id])
            shares = {"clean": card.clean, **card.survivors}
            here = [stages.index(stage) for stage in shares]
            axes.plot(here, [100 * share.value for share in shares.values()], color=look.color, linestyle=look.line,
                      marker=look.marker, markersize=4, markerfacecolor=look.fill)  # fmt: skip
            last = list(card.survivors.values())
            said.append(
                f"{card.model.label} on {column.label} {last[0].count} after the first stage, {last[-1].count} at the end"
            )
        axes.set_xticks(range(len(stages)), stages, rotation=25, ha="right")
        axes.set(ylabel="still right, %", ylim=(0, None))
        frame(axes, column.label)
    title = f"Survivors after each stage: {block.label}"
    set_title(figure, title)
    legend(figure, [handle(row, looks[row.key]) for row in sheet.rows if row.key in drawn])
    return finish(figure, name, title, f"{title}. {some(said)}.", detail=True)
