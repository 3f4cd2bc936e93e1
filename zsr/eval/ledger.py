"""The ledger of a measurement: a line for each finished batch, so that a killed run loses at most one.

A file of JSON lines. The first names the card that it belongs to; the card's id is a digest of everything that decides a
verdict, the version of the code included, so lines of another measurement cannot mix in. Each further line is one batch,
flushed to the disk before the next begins. A line that a kill tore is dropped when the file is opened again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from zsr.eval.card import VERSION

CLEAN = -1
"""Stage of a batch that was classified as it is."""


@dataclass(frozen=True)
class Line:
    """What came out of one batch.

    Attributes:
        stage: of the attack, from 0; :data:`CLEAN` without one.
        ids: of the samples, in the set's own numbers. Lists below have an entry for each.
        pred: classes that each judge sees, by the judge's name; on the attacked images if there was an attack.
        success: whether the attack is done with the sample.
        zero_grad: whether its input gradient was ever all zero.
        passes: image-encoder passes, forward or backward, one for each image.
        redone: samples of a bf16 run that were attacked again in float32, which had them right.
        facts: what the cheap checks saw of each judge (zsr/attacks/checks.py): sums other than zero, by place.
    """

    # An unknown field was written by other code: what it meant there is not known here.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    stage: int
    ids: list[int]
    pred: dict[str, list[int]]
    success: list[bool] = field(default_factory=list)
    zero_grad: list[bool] = field(default_factory=list)
    passes: int = 0
    seconds: float = 0.0
    redone: int = 0
    facts: dict[str, dict[str, int]] = field(default_factory=dict)


_LINE = TypeAdapter(Line)
_REMOVE = "remove it to measure anew"


class Ledger:
    """The lines of one measurement, on disk or (``path`` None) in memory alone. Use it in a ``with`` block.

    Args:
        owner: id of the card, or of the clean predictions, that the lines belong to.
        about: further words for the first line, for people.
        wait: for another process that writes to it; else that is a mistake.

    Raises:
        ValueError: another process writes to it, it is another card's or another version's, or it is broken.
    """

    def __init__(
        self, path: Path | None, owner: str, about: Mapping[str, Any] | None = None, wait: bool = False
    ) -> None:
        self.path = path
        self.lines: list[Line] = []
        self._file: IO[bytes] | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path}: another zsr eval writes to it; wait for it, or choose another --out") from None
        except OSError:
            pass  # a file system without locks
        self._read(owner)
        if not self._file.tell():
            self._write({"ledger": owner, "version": VERSION, **(about or {})})

    def append(self, line: Line) -> None:
        """Keep a finished batch for good."""
        self.lines.append(line)
        if self._file is not None:
            self._write(asdict(line))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, owner: str) -> None:
        assert self._file is not None
        self._file.seek(0)
        whole = self._file.read()
        end = whole.rfind(b"\n") + 1
        first, *others = whole[:end].splitlines() or [b""]
        if first:
            self._check_header(first, owner)
        self.lines = [self._parse(text, number) for number, text in enumerate(others, 2)]
        # What follows the last line break was being written when the process died.
        self._file.truncate(end)
        self._file.seek(end)

    def _check_header(self, text: bytes, owner: str) -> None:
        try:
            header = json.loads(text)
            found, version = header["ledger"], header.get("version", 1)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.path}: its first line names no measurement; {_REMOVE}") from None
        if found != owner:
            raise ValueError(f"{self.path}: belongs to another measurement; remove it, or choose another --out")
        if version != VERSION:
            raise ValueError(
                f"{self.path}: was begun by version {version} of the code that makes verdicts, this is {VERSION}; {_REMOVE}"
            )

    def _parse(self, text: bytes, number: int) -> Line:
        try:
            return _LINE.validate_json(text)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise ValueError(
                f"{self.path}: line {number} is no finished batch ({where}{': ' * bool(where)}{fault['msg']}); {_REMOVE}"
            ) from None

    def _write(self, content: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(content, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
