"""What a tar file holds and where, found from its headers alone.

A tar is uncompressed, so a sample is a few byte ranges of the file.
"""

from __future__ import annotations

import os
import tarfile
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
    for path_in_tar, offset, size in _plain_members(file) or _any_members(file, where):
        folder, _, name = path_in_tar.rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not samples or samples[-1][0] != key:
            samples.append((key, []))
        samples[-1][1].append(Member(extension.lower(), offset, size))
    return samples


def _plain_members(file: BinaryIO) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files in a tar with nothing but plain headers, else an empty list.

    Every loader process of a node scans every shard, so this must cost little beside decoding a few images; the tarfile
    module takes ten times as long, and is left the tars with long names, extended headers or damage.
    """
    members: list[tuple[str, int, int]] = []
    descriptor, at = file.fileno(), 0
    end = os.fstat(descriptor).st_size
    while True:
        header = os.pread(descriptor, 512, at)
        if len(header) < 512 or header[0] == 0:
            return members if len(header) == 512 else []
        digits = header[124:136].rstrip(b" \0")
        if header[257:262] != b"ustar" or header[156] not in b"0\0" or not digits.isdigit() or header[345]:
            return []
        size = int(digits, 8)
        name = header[: header.index(0)] if header[99] == 0 else header[:100]
        members.append((name.decode("utf-8", "surrogateescape"), at + 512, size))
        at += 512 + (size + 511) // 512 * 512
        if at > end:
            return []


def _any_members(file: BinaryIO, where: str) -> list[tuple[str, int, int]]:
    members: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    members.append((member.name, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise ValueError(f"{where} is not a plain tar file: {error}") from None
    return members
