"""The README's file structure is the tree's: a file that is added, moved or deleted has to be told of there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_module_is_named_in_the_file_structure_and_every_name_there_exists() -> None:
    section = (ROOT / "README.md").read_text().split("## File structure", 1)[1].split("```")[1]
    room, named = "", set()
    for line in section.splitlines():
        found = re.match(r"( *)(\S+?)(/?) +#", line) or re.match(r"( *)(\S+?)(/)$", line)
        if found is None:
            continue
        indent, name, folder = len(found[1]), found[2], found[3]
        if folder:
            room = name if indent == 0 else f"zsr/{name}" if indent == 2 else room
        elif name.endswith(".py"):
            named.add(f"{'zsr' if name == '_torchvision.py' else room}/{name}")
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("zsr", "sweeps")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == files
