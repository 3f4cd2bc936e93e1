"""docs/attacks.md explains every attack and every check, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

from zsr.attacks.checks import CHECKS
from zsr.config import ATTACKS

PAGE = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text(encoding="utf-8")


def sections(title: str) -> dict[str, str]:
    """Texts under the headings of a part, by heading."""
    part = re.split(r"^## ", PAGE.split(f"\n## {title}\n", 1)[1], flags=re.MULTILINE)[0]
    found = re.split(r"^### (\S+)\n", part, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def test_every_check_has_its_section_and_every_section_its_check() -> None:
    found = sections("Checks")
    assert list(found) == list(CHECKS), "in the order of the catalogue"
    for name, text in found.items():
        assert re.search(r"`(note|warn|fail)`", text), f"{name}: says when it is how bad"
        assert "Do: " in text, f"{name}: says what to do"


def test_every_attack_has_its_section_and_every_section_its_attack() -> None:
    found = sections("Attacks")
    assert sorted(found) == sorted(ATTACKS.names())
    assert all("compare" in text or "number" in text for text in found.values())
