"""How much of a folder ``ray job submit`` would upload, given its ``.rayignore`` and ``.gitignore``."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path


def upload_size(folder: Path) -> tuple[int, list[tuple[str, int]]]:
    """Bytes of all files that are not ignored, and the three largest entries at the top with theirs."""
    patterns = [line for name in (".gitignore", ".rayignore") for line in _patterns(folder / name)]
    by_entry: dict[str, int] = {}
    for root, directories, files in os.walk(folder):
        inside = Path(root).relative_to(folder)
        directories[:] = [name for name in directories if not ignored(inside / name, patterns, is_folder=True)]
        for name in files:
            path = inside / name
            if not ignored(path, patterns) and not (folder / path).is_symlink():
                by_entry[path.parts[0]] = by_entry.get(path.parts[0], 0) + (folder / path).stat().st_size
    largest = sorted(by_entry.items(), key=lambda entry: -entry[1])[:3]
    return sum(by_entry.values()), largest


def ignored(path: Path, patterns: list[str], is_folder: bool = False) -> bool:
    """Whether gitignore ``patterns`` leave ``path`` out, its parents being kept. The last pattern that fits decides."""
    out = False
    for pattern in patterns:
        negated = pattern.startswith("!")
        bare = pattern.lstrip("!")
        if bare.endswith("/") and not is_folder:
            continue
        bare = bare.rstrip("/")
        # A slash before the end ties a pattern to the root; without one it fits a name at any depth.
        target = str(path) if "/" in bare else path.name
        if fnmatch.fnmatch(target, bare.lstrip("/")):
            out = not negated
    return out


def _patterns(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
