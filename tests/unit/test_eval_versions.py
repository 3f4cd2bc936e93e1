"""What is there stands only for what would be made again: same code, same bytes, a sound ledger."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from card_factory import make_card
from shard_factory import make_shards

import zsr.eval.card
import zsr.eval.ledger
import zsr.eval.plan
from zsr.data.shards import ShardSet
from zsr.eval.card import VERSION, column_id
from zsr.eval.images import Images
from zsr.eval.ledger import Ledger, Line
from zsr.eval.plan import Blank


def test_another_version_of_the_code_makes_another_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card = make_card()
    blank = Blank(card.protocol, card.dataset, card.model, card.defense, card.attack, card.seed)
    clean = column_id(card.protocol, card.dataset, None)
    before = blank.id, blank.column
    for module in (zsr.eval.card, zsr.eval.plan):
        monkeypatch.setattr(module, "VERSION", VERSION + 1)
    assert blank.id != before[0] and blank.column != before[1]
    assert column_id(card.protocol, card.dataset, None) == clean  # a set stays the set that it is


def test_a_set_built_anew_at_its_address_is_another_set(tmp_path: Path) -> None:
    address = make_shards(tmp_path / "set", num_samples=20, image_size=16, shard_size=10)
    digest = Images(ShardSet(address), 16).digest
    assert Images(ShardSet(address), 32).digest == digest
    make_shards(tmp_path / "set", num_samples=20, image_size=20, shard_size=10)  # same keys and labels, other images
    anew = Images(ShardSet(address), 16)
    assert anew.digest != digest
    assert sorted(anew.keys.values()) == sorted(Images(ShardSet(address), 32).keys.values())


def broken(path: Path, line: str) -> str:
    """What opening a ledger that ends in this line says."""
    with Ledger(path, "card") as ledger:
        ledger.append(Line(0, [1], {"bare": [3]}, success=[True], zero_grad=[False]))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="remove it to measure anew") as fault, Ledger(path, "card"):
        pass
    return str(fault.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"stage":0,"ids":[2],"pred":{"bare":[3]},"certified":[true]}',
        '{"ids":[2],"pred":{"bare":[3]}}',
        '{"stage":0,"ids":["x"],"pred":{"bare":[3]}}',
        "\x00\x00",
        "[]",
    ],
)
def test_a_broken_ledger_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    assert f"{tmp_path / 'ledger'}: line 3 is no finished batch" in broken(tmp_path / "ledger", line)


@pytest.mark.parametrize("header", ["garbage", "[]", '{"measurement":"card"}', "\xff"])
def test_a_ledger_without_its_first_line_is_named(tmp_path: Path, header: str) -> None:
    (tmp_path / "ledger").write_bytes(header.encode("latin-1") + b"\n")
    with (
        pytest.raises(ValueError, match="its first line names no measurement; remove it"),
        Ledger(tmp_path / "ledger", "card"),
    ):
        pass


def test_a_ledger_goes_on_under_its_own_version_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(tmp_path / "ledger", "card"):
        pass
    assert json.load(io.BytesIO((tmp_path / "ledger").read_bytes()))["version"] == VERSION
    monkeypatch.setattr(zsr.eval.ledger, "VERSION", VERSION + 1)
    with pytest.raises(ValueError, match=f"version {VERSION} of the code"), Ledger(tmp_path / "ledger", "card"):
        pass
    # Before versions were written there was one.
    (tmp_path / "old").write_text('{"ledger":"card"}\n')
    with pytest.raises(ValueError, match="version 1 of the code"), Ledger(tmp_path / "old", "card"):
        pass
