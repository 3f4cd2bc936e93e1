"""Averages over sets: which there are for some cards, over which sets each is taken, and whose numbers make none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from zsr.data.suite import Suite, leave_out
from zsr.eval.card import ResultCard

Item = TypeVar("Item")
WITHOUT_SUITE = {
    "all": [],
    "without_chance_level": ["chance_level"],
    "without_training_set": ["training_set"],
    "without_both": ["chance_level", "training_set"],
}
"""What is left out of the averages over sets that were named one by one."""


@dataclass(frozen=True)
class Average:
    """A mean over sets.

    Attributes:
        name: such as ``all``, or what is left out.
        over: keys of the sets that it is taken over, each measured for some card.
        named: how many sets the protocol names for it.
    """

    name: str
    over: tuple[str, ...]
    named: int

    @property
    def label(self) -> str:
        """For tables; says where sets of the protocol are missing."""
        sets = str(self.named) if len(self.over) == self.named else f"{len(self.over)} of {self.named}"
        return f"mean of {sets}" + ("" if self.name == "all" else f", {self.name.replace('_', ' ')}")

    def take(self, by_set: Mapping[str, Item]) -> list[Item] | None:
        """What one row has in one column for each of the sets; None unless it has all of them.

        So no mean is of other sets than those around it: not in its column, and not under another attack.
        """
        return None if self.missing(by_set) else [by_set[key] for key in self.over]

    def missing(self, by_set: Mapping[str, Item]) -> list[str]:
        """Keys of the sets that are not there."""
        return [key for key in self.over if key not in by_set]


def averages_of(cards: Sequence[ResultCard], suite: Suite | None) -> list[Average]:
    """The averages that a table of these cards has, each over two sets or more.

    The suite says what each leaves out; without one it is :data:`WITHOUT_SUITE`. An average that leaves out nothing else than
    one before it is not repeated. Sets of the suite that no card is of are in none, and its label counts them.

    Args:
        cards: all of the table, of every model, so that all rows leave out the same sets.
        suite: that the cards were measured under.
    """
    here = {card.dataset.key: card.dataset.chance_level for card in cards}
    if suite is None:
        named = leave_out(WITHOUT_SUITE, here, training_sets(cards, list(here), None))
    else:
        keys = [dataset.key for dataset in suite.datasets]
        named = suite.averages(training_sets(cards, keys, suite.protocol.training_set))
    found: dict[tuple[str, ...], Average] = {}
    for name, keys in named.items():
        over = tuple(key for key in keys if key in here)
        if len(over) > 1:
            found.setdefault(tuple(keys), Average(name, over, len(keys)))
    return list(found.values())


def training_sets(cards: Sequence[ResultCard], keys: Sequence[str], usual: str | None) -> set[str]:
    """Sets among ``keys`` that a model of these cards was trained on, by the address of its training data.

    Args:
        usual: what a model whose address names none of them counts as trained on.
    """
    found: set[str] = set()
    for address in {card.model.trained_on or "" for card in cards}:
        parts = {address, *re.split(r"[/:]+", address)}
        found |= parts & set(keys) or {usual or ""}
    return found & set(keys)
