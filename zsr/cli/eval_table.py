"""What zsr eval prints: a table for each model, made from its cards, and what has to be said about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import typer

from zsr.cli.output import percent, print_table

if TYPE_CHECKING:
    from zsr.data.suite import Suite
    from zsr.eval.averages import Average
    from zsr.eval.card import ResultCard, Share


def show_cards(cards: Sequence[ResultCard], suite: Suite | None) -> None:
    """Print the tables with their averages, and the findings that a reader must know.

    Args:
        cards: of one call, all models; its tables leave the same sets out of their averages.
        suite: that they were measured under.
    """
    from zsr.eval.averages import averages_of

    averages = averages_of(cards, suite)
    for digest in dict.fromkeys(card.model.weights_digest for card in cards):
        _show_model([card for card in cards if card.model.weights_digest == digest], averages)


def _show_model(cards: Sequence[ResultCard], averages: Sequence[Average]) -> None:
    columns = list(dict.fromkeys(_column(card, cards) for card in cards if card.attack is not None))
    rows: dict[tuple[str, str], dict[str, ResultCard]] = {}
    for card in cards:
        row = rows.setdefault((card.dataset.key, card.defense.name if card.defense else "none"), {})
        row["" if card.attack is None else _column(card, cards)] = card
    defended = any(card.defense is not None for card in cards)
    header = ["set", *(["defence"] if defended else []), "images", "chance", "clean", *columns]
    body = []
    for (key, defense), row in rows.items():
        any_card = next(iter(row.values()))
        body.append(
            [
                key,
                *([defense] if defended else []),
                str(any_card.dataset.samples),
                percent(any_card.dataset.chance),
                _with_interval(any_card.clean),
                *(_robust(row.get(column)) for column in columns),
            ]
        )
    body += _means(rows, columns, averages, defended)
    titles = dict.fromkeys(card.attack.title for card in cards if card.attack is not None)
    title = ", ".join([f"{cards[0].model.name}: accuracy in %", *titles, "with 95% intervals"])
    if any(card.attack is not None and card.attack.knowledge == "oblivious" for card in cards):
        title += "; oblivious: the attack does not know the defence"
    print_table(title, header, body)
    for sentence in _sentences(cards):
        typer.echo(sentence)


def _column(card: ResultCard, cards: Sequence[ResultCard]) -> str:
    attack = card.attack
    assert attack is not None
    several = len({other.attack.name for other in cards if other.attack is not None}) > 1
    crafted = "" if attack.crafted_on == "served" else " crafted"
    # A number against an attack that does not know the defence stands beside the bare model's, never below it.
    unaware = " oblivious" if attack.knowledge == "oblivious" else ""
    return f"{attack.name + ' ' if several else ''}{attack.norm} {attack.eps_text}{crafted}{unaware}"


def _means(
    rows: Mapping[tuple[str, str], Mapping[str, ResultCard]],
    columns: Sequence[str],
    averages: Sequence[Average],
    defended: bool,
) -> Iterator[list[str]]:
    """A line for each average, without and with the defence; an empty cell where a set of it was not measured."""
    for defense in dict.fromkeys(defense for _, defense in rows):
        there = {key: row for (key, other), row in rows.items() if other == defense}
        clean = {key: next(iter(row.values())).clean for key, row in there.items()}
        attacked = [{key: row[column] for key, row in there.items() if column in row} for column in columns]
        for average in averages:
            cells = [_mean(average.take(clean)), *(_mean_robust(average.take(found)) for found in attacked)]
            if any(cells):
                yield [average.label, *([defense] if defended else []), "", "", *cells]


def _mean(shares: Sequence[Share] | None) -> str:
    return "" if shares is None else percent(fmean(share.value for share in shares))


def _mean_robust(cards: Sequence[ResultCard] | None) -> str:
    if cards is None:
        return ""
    failed = "" if all(card.believed for card in cards) else " !"
    return _mean([card.robust for card in cards if card.robust is not None]) + failed


def _robust(card: ResultCard | None) -> str:
    if card is None or card.robust is None:
        return ""
    # Zero input gradients mean that the attack was blind there, not that the model is robust.
    blind = next((finding.value for finding in card.checks if finding.id == "zero-gradients"), None)
    failed = "" if card.believed else " !"
    return _with_interval(card.robust) + (f" {percent(blind)}% blind" if blind else "") + failed


def _with_interval(share: Share) -> str:
    return f"{percent(share.value)} ({percent(share.low)}-{percent(share.high)})"


def _sentences(cards: Sequence[ResultCard]) -> Iterator[str]:
    """What was left after each stage, and what the checks found; the same finding at several budgets is said once."""
    budgets: dict[tuple[str, str, str], list[str]] = {}
    for card in cards:
        where = f"{card.dataset.key}{' behind ' + card.defense.name if card.defense else ''}"
        label = "clean" if card.attack is None else f"{card.attack.name} {card.attack.eps_text}"
        if card.survivors:
            after = ", ".join(f"{stage} {percent(share.value)}" for stage, share in card.survivors.items())
            yield f"{where} {label}: after {after}"
        for finding in card.checks:
            if finding.level in ("warn", "fail"):
                what = (f"{finding.level}: {where}", finding.id, finding.sentence)
                budgets.setdefault(what, []).append(label)
    for (where, check, sentence), labels in budgets.items():
        yield f"{where} {', '.join(dict.fromkeys(labels))}: {check}: {sentence}"
