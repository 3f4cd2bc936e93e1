"""What a tar file holds and where, found from its headers alone.

A tar is uncompressed, so a sample is a few byte ranges of the file.
"""

from __future__ import annotations

import io
import os
import tarfile
from itertools import islice
from typing import BinaryIO, NamedTuple


class Member(NamedTuple):
    """One part of a sample: its extension in lower case, and the bytes of the tar that hold it."""

    extension: str
    offset: int
    size: int


def list_samples(file: BinaryIO, where: str) -> list[tuple[str, list[Member]]]:
    """Key and member ranges of each sample of a tar file open at its beginning; members with one key follow each other.

    Args:
        file: a real file, not a stream.
        where: its name, for messages.

    Raises:
        ValueError: the file is no tar, is compressed or cut short.
    """
    samples: list[tuple[str, list[Member]]] = []
    for path_in_tar, offset, size in list_members(file, where):
        folder, _, name = path_in_tar.rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not samples or samples[-1][0] != key:
            samples.append((key, []))
        samples[-1][1].append(Member(extension.lower(), offset, size))
    return samples


def list_members(
    file: BinaryIO, where: str, start: int = 0, end: int | None = None, first_only: bool = False
) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files in a tar; offsets count from the beginning of ``file``.

    Args:
        file: a real file, not a stream.
        where: the tar's name, for messages.
        start, end: the bytes of the file that are the tar, for one that lies inside another.
        first_only: look at the first file in it only.

    Raises:
        ValueError: it is no tar, is compressed or cut short.
    """
    stop = os.fstat(file.fileno()).st_size if end is None else end
    return _plain_members(file.fileno(), start, stop, first_only) or _any_members(file, where, start, stop, first_only)


def _plain_members(descriptor: int, start: int, end: int, first_only: bool) -> list[tuple[str, int, int]]:
    """The files of a tar with nothing but plain headers, else an empty list.

    Every loader process of a node scans every shard, so this must cost little beside decoding a few images; the tarfile
    module takes ten times as long, and is left the tars with long names, extended headers or damage.
    """
    members: list[tuple[str, int, int]] = []
    at = start
    while not (first_only and members):
        header = os.pread(descriptor, 512, at)
        if len(header) < 512 or header[0] == 0 or at >= end:
            return members if len(header) == 512 and at < end else []
        digits = header[124:136].rstrip(b" \0")
        if header[257:262] != b"ustar" or header[156] not in b"0\0" or not digits.isdigit() or header[345]:
            return []
        size = int(digits, 8)
        name = header[: header.index(0)] if header[99] == 0 else header[:100]
        members.append((name.decode("utf-8", "surrogateescape"), at + 512, size))
        at += 512 + (size + 511) // 512 * 512
        if at > end:
            return []
    return members


def _any_members(file: BinaryIO, where: str, start: int, end: int, first_only: bool) -> list[tuple[str, int, int]]:
    try:
        with tarfile.open(fileobj=io.BufferedReader(_Part(file.fileno(), start, end)), mode="r:") as tar:
            members = (member for member in tar if member.isfile())
            return [
                (member.name, start + member.offset_data, member.size)
                for member in islice(members, 1 if first_only else None)
            ]
    except tarfile.TarError as error:
        raise ValueError(f"{where} is not a plain tar file: {error}") from None


class _Part(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        self.descriptor, self.start, self.length, self.at = descriptor, start, end - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self.length - self.at))
        content = os.pread(self.descriptor, wanted, self.start + self.at)
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)
