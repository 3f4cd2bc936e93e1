"""What classes are called: from a file, from open_clip's list for ImageNet, or from the keys that the source has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from zsr.data.suite.names import imagenet_synsets, names_from


def name_classes(keys: Sequence[str], option: str | None = None) -> list[str]:
    """The classes' names, in the order of the keys.

    Args:
        keys: folder names, WordNet ids, or numbers from 0.
        option: "imagenet" for open_clip's names of WordNet ids; or a text file with a line a class, either the key and
            the name ("n01440764 tench", with a space, comma or tab between), or the name alone, in the order of the
            keys. Without it a key with spaces for underscores is the name.

    Raises:
        ValueError: the file cannot be read, or has no name for a class.
    """
    if option is None:
        return [key.replace("_", " ") for key in keys]
    if option == "imagenet":
        by_key = dict(zip(imagenet_synsets(), names_from("open_clip:imagenet")))
        names = list(by_key.values())
        if _are_numbers(keys) and len(keys) <= len(names):
            return names
        what = "ImageNet's list"
    else:
        lines = _read(Path(option))
        by_key = dict(_key_and_name(line) for line in lines)
        names, what = lines, option
    missing = [key for key in keys if key not in by_key]
    if not missing:
        return [by_key[key] for key in keys]
    # Names alone: only if no line begins with a key, or a wrong file would name everything wrongly.
    enough = len(names) == len(keys) or (len(names) > len(keys) and _are_numbers(keys))
    if option != "imagenet" and len(missing) == len(keys) and enough:
        return names
    raise ValueError(
        f"--class-names {option}: {what} has no name for {len(missing)} of {len(keys)} classes, such as {missing[0]}; "
        "give each a line with key and name, or one name a line in the order of the sorted keys"
    )


def _are_numbers(keys: Sequence[str]) -> bool:
    return list(keys) == [str(number) for number in range(len(keys))]


def _key_and_name(line: str) -> tuple[str, str]:
    key, *name = re.split(r"\t" if "\t" in line else r"[,\s]\s*", line, maxsplit=1)
    return key.strip(), name[0].strip() if name else key


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--class-names {path}: cannot be read: {error}") from None
    lines = [re.sub(r"\s+$", "", line) for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"--class-names {path}: holds no names")
    return lines
