"""Cards put into tables: one sheet a protocol, one row a model and its defence, one column a set under one attack.

Two numbers share a column only if their cards' ``column`` agrees. Clean accuracy does not depend on the attack, so its columns
are shared by all attacks of a set. Cards that meet in one cell (other seeds) become their mean, with their spread.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from zsr.eval.card import AttackInfo, DatasetInfo, ProtocolInfo, ResultCard, Share, column_id, digest_of

Item = TypeVar("Item")
NORMS = {"linf": "L-inf", "l2": "L2"}


@dataclass
class Cell:
    """What is known of one row in one column; shares of 1."""

    value: float
    low: float
    """Of the 95 % interval; of several cards the lowest."""
    high: float
    spread: float | None = None
    """Standard deviation over several cards."""
    num_cards: int = 1
    seeds: tuple[int, ...] = ()
    failed: tuple[str, ...] = ()
    """Ids of the checks that say: not to be believed."""
    warned: tuple[str, ...] = ()
    best: bool = False
    """Best of its column, or not distinguishable from the best, where the column tells rows apart at all."""
    delta: float | None = None
    """Minus the baseline's value."""


@dataclass(frozen=True)
class Row:
    """A model, and the defence in front of it."""

    key: str
    label: str
    model: str
    """Shared by the rows of one model with and without defences."""
    defense: str | None


@dataclass
class Column:
    """A set, or an average over sets."""

    key: str
    label: str
    dataset: DatasetInfo | None
    """None for an average."""
    metric: str
    clean_key: str
    """Of the column that holds the same images' clean accuracy."""
    cells: dict[str, Cell] = field(default_factory=dict)
    """By row; a row without a card is not in it."""
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of an average: the sets that a row lacks."""


@dataclass
class Block:
    """The columns of one attack at one budget, or of clean accuracy."""

    key: str
    label: str
    attack: AttackInfo | None
    columns: list[Column]
    averages: list[Column] = field(default_factory=list)

    @property
    def leaves(self) -> list[Column]:
        return [*self.columns, *self.averages]

    @property
    def oblivious(self) -> bool:
        return self.attack is not None and self.attack.knowledge == "oblivious"

    @property
    def family(self) -> str:
        """Shared by the budgets of one attack; a step size may follow from the budget."""
        return "" if self.attack is None else family_of(self.attack)


@dataclass
class Sheet:
    """All that was measured under one protocol."""

    protocol: ProtocolInfo
    """Its metric is the first card's: sets may have their own."""
    title: str
    rows: list[Row]
    blocks: list[Block]
    cards: list[ResultCard]
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> dict[str, Column]:
        """Columns of clean accuracy, by key."""
        return {column.key: column for column in self.blocks[0].columns}


def make_rows(cards: Sequence[ResultCard]) -> tuple[list[Row], dict[str, str]]:
    """The rows of a report, and each card's row by card id. A defence's seed makes no row of its own."""
    first: dict[str, ResultCard] = {}
    row_of = {}
    for card in cards:
        key = digest_of(_model_key(card), card.defense and card.defense.model_dump(exclude={"seed"}))
        first.setdefault(key, card)
        row_of[card.id] = key
    models = {_model_key(card): card for card in first.values()}
    model_labels = distinct(models, lambda card: card.model.label, lambda card: card.model.weights_digest[:7])
    labels = distinct(
        first,
        lambda card: " + ".join([model_labels[_model_key(card)], *([card.defense.name] if card.defense else [])]),
        lambda card: _settings(card.defense.settings | {"gate": card.defense.gate}) if card.defense else "",
    )
    order = {key: place for place, key in enumerate(models)}
    rows = [
        Row(key, labels[key], _model_key(card), card.defense.name if card.defense else None)
        for key, card in sorted(
            first.items(), key=lambda item: (order[_model_key(item[1])], item[1].defense is not None)
        )
    ]
    return rows, row_of


def make_sheets(cards: Sequence[ResultCard], rows: Sequence[Row], row_of: dict[str, str]) -> list[Sheet]:
    """One sheet for each protocol, without averages and marks (zsr/eval/report/marks.py)."""
    groups = group(cards, lambda card: digest_of(card.protocol.model_dump(exclude={"metric"})))
    titles = distinct(
        {key: found[0].protocol for key, found in groups.items()},
        lambda protocol: protocol.suite or "sets named one by one",
        lambda protocol: f"at {protocol.resolution} resolution, {protocol.precision}, {protocol.preprocessing}",
    )
    sheets = []
    for key, found in groups.items():
        here = {row_of[card.id] for card in found}
        own_rows = [row for row in rows if row.key in here]
        sheets.append(Sheet(found[0].protocol, titles[key], own_rows, _blocks(found, row_of), found))
    return sheets


def _blocks(cards: list[ResultCard], row_of: dict[str, str]) -> list[Block]:
    clean = Block("clean", "clean", None, _columns(cards, row_of, clean_key, _clean_cell))
    attacked = [card for card in cards if card.attack and card.robust]
    groups = group(attacked, lambda card: digest_of(card.attack and card.attack.model_dump(exclude={"eps_text"})))
    attacks = {key: found[0].attack for key, found in groups.items() if found[0].attack}
    labels = distinct(attacks, _attack_label, lambda attack: _settings(attack.settings))
    blocks = [
        Block(key, labels[key], attacks[key], _columns(groups[key], row_of, lambda card: card.column, _robust_cell))
        for key in attacks
    ]
    return [clean, *sorted(blocks, key=_block_order)]


def _columns(
    cards: Sequence[ResultCard],
    row_of: dict[str, str],
    key_of: Callable[[ResultCard], str],
    cell_of: Callable[[list[ResultCard]], Cell],
) -> list[Column]:
    groups = group(cards, key_of)
    sets = {key: found[0].dataset for key, found in groups.items()}
    labels = distinct(sets, set_label, lambda data: f"{data.samples} of {data.of}, {data.subset_digest[:6]}")
    columns = []
    for key, found in groups.items():
        cells = {row: cell_of(own) for row, own in group(found, lambda card: row_of[card.id]).items()}
        columns.append(Column(key, labels[key], sets[key], found[0].protocol.metric, clean_key(found[0]), cells))
    return columns


def family_of(attack: AttackInfo) -> str:
    """Shared by the budgets of one attack; a step size may follow from the budget."""
    rest = attack.model_dump(exclude={"eps", "eps_text", "settings"})
    return digest_of(rest, {k: v for k, v in attack.settings.items() if k not in ("eps", "step_size")})


def _robust_cell(cards: list[ResultCard]) -> Cell:
    return _cell([(card, card.robust) for card in cards if card.robust], cards)


def _clean_cell(cards: list[ResultCard]) -> Cell:
    # The attacks' cards repeat one clean measurement; only a defence's noise makes it another with another seed.
    by_value = {(card.clean.count, card.clean.value, card.seed if card.defense else 0): card for card in cards}
    # Checks speak of the number under attack, except on a card that has none.
    return _cell([(card, card.clean) for card in by_value.values()], [card for card in cards if card.attack is None])


def _cell(found: Sequence[tuple[ResultCard, Share]], judged: Iterable[ResultCard]) -> Cell:
    shares = [share for _, share in found]
    values = [share.value for share in shares]
    findings = [finding for card in judged for finding in card.checks]
    return Cell(
        value=statistics.fmean(values),
        low=min(share.low for share in shares),
        high=max(share.high for share in shares),
        spread=statistics.stdev(values) if len(values) > 1 else None,
        num_cards=len(values),
        seeds=tuple(sorted({card.seed for card, _ in found})),
        failed=tuple(dict.fromkeys(finding.id for finding in findings if finding.level == "fail")),
        warned=tuple(dict.fromkeys(finding.id for finding in findings if finding.level == "warn")),
    )


def clean_key(card: ResultCard) -> str:
    """Shared by the cards of one set, whatever the attack."""
    return column_id(card.protocol, card.dataset, None)


def _model_key(card: ResultCard) -> str:
    return digest_of(card.model.arch, card.model.weights_digest, card.model.logit_scale)


def _block_order(block: Block) -> tuple[int, str, str, float]:
    attack = block.attack
    assert attack is not None
    knowledge = ("white-box", "oblivious", "adaptive").index(attack.knowledge)
    return knowledge, attack.title, attack.crafted_on, attack.eps


def _attack_label(attack: AttackInfo) -> str:
    crafted = [] if attack.crafted_on == "served" else [f"crafted on {attack.crafted_on}"]
    knows = {"oblivious": ["attack does not know the defence"], "adaptive": ["attack knows the defence"]}
    return ", ".join(
        [attack.title, f"{NORMS[attack.norm]} {attack.eps_text}", *knows.get(attack.knowledge, []), *crafted]
    )


def set_label(data: DatasetInfo) -> str:
    """A set's name, short enough for the head of a column."""
    if "/" in data.key:  # an address, where the registry has no name
        return "/".join(data.key.rstrip("/").split("/")[-2:])
    return data.key if data.split == "test" or data.key.endswith(data.split) else f"{data.key}/{data.split}"


def _settings(settings: dict[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(settings.items()))


def group(items: Iterable[Item], key_of: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Items by key, in order of appearance."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(key_of(item), []).append(item)
    return groups


def distinct(items: dict[str, Item], name: Callable[[Item], str], detail: Callable[[Item], str]) -> dict[str, str]:
    """A label for each key: its name, with what tells it apart where a name comes twice."""
    names = {key: name(item) for key, item in items.items()}
    twice = {one for one, times in Counter(names.values()).items() if times > 1}
    words = {key: detail(items[key]).split(" ") for key, one in names.items() if one in twice}
    labels = {}
    for key, one in names.items():
        if one in twice:
            others = [set(words[other]) for other in words if names[other] == one]
            own = [word for word in words[key] if not all(word in other for other in others)]
            one = f"{one} ({' '.join(own)})" if own else f"{one} ({key[:7]})"
        labels[key] = one
    again = {one for one, times in Counter(labels.values()).items() if times > 1}
    return {key: f"{one} ({key[:7]})" if one in again else one for key, one in labels.items()}


def mean_cell(cells: Sequence[Cell]) -> Cell:
    """The plain mean of several sets' cells; its interval takes the sets' errors to be independent."""
    half = math.sqrt(sum(((cell.high - cell.low) / 2) ** 2 for cell in cells)) / len(cells)
    value = statistics.fmean(cell.value for cell in cells)
    return Cell(
        value,
        max(0.0, value - half),
        min(1.0, value + half),
        failed=tuple(dict.fromkeys(name for cell in cells for name in cell.failed)),
        warned=tuple(dict.fromkeys(name for cell in cells for name in cell.warned)),
    )
