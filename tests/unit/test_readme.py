"""The README's file structure is the tree's: a file that is added, moved or deleted has to be told of there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_module_is_named_in_the_file_structure_and_every_name_there_exists() -> None:
    section = (ROOT / "README.md").read_text().split("## File structure", 1)[1].split("```")[1]
    rooms: dict[int, str] = {}  # by indent: the folder whose entries stand two places further in
    named = set()
    for line in section.splitlines():
        found = re.match(r"( *)(\S+?)(/?) +#", line) or re.match(r"( *)(\S+?)(/)$", line)
        if found is None:
            continue
        indent, name = len(found[1]), found[2]
        path = f"{rooms[indent - 2]}/{name}" if indent else name
        if found[3]:
            rooms[indent] = path
        elif name.endswith(".py"):
            named.add(path)
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("zsr", "sweeps")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == files
