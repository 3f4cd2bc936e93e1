"""Where runs and sweeps keep what must outlive every process: a folder that all nodes share, or an ``s3://`` prefix."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

HOME_VARIABLE = "ZSR_HOME"
"""What a relative ``launch.storage`` is relative to, for jobs whose own directory is a throw-away copy."""


class Store:
    """Small files under one root, on disk or in a bucket.

    Args:
        root: folder or ``s3://bucket/prefix``; a relative folder lies under ``ZSR_HOME`` or the current directory.
    """

    def __init__(self, root: str) -> None:
        self.is_local = "://" not in root
        if self.is_local:
            base = Path(os.environ.get(HOME_VARIABLE) or Path.cwd())
            self.root = str((base / Path(root).expanduser()).resolve())
        else:
            self.root = root.rstrip("/")

    def at(self, *parts: str) -> str:
        """Address of something under the root, as Ray wants it."""
        return "/".join([self.root, *parts])

    def child(self, *parts: str) -> Store:
        """The store rooted at a folder of this one."""
        return Store(self.at(*parts))

    def folder(self, *parts: str) -> Path:
        """A local folder, made if missing: inside a local store, else scratch of this machine that belongs to it."""
        path = Path(self.at(*parts)) if self.is_local else scratch(self.at(*parts))
        path.mkdir(parents=True, exist_ok=True)
        return path

    def read_json(self, *parts: str) -> Any | None:
        """The content of a JSON file, or ``None`` if it is not there."""
        try:
            filesystem, path = self._filesystem(*parts)
            with filesystem.open_input_stream(path) as file:
                return json.loads(file.read())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def write_json(self, content: Any, *parts: str) -> None:
        """Replace a JSON file as a whole; a reader never sees half of it."""
        text = json.dumps(content, indent=1).encode()
        if self.is_local:
            path = Path(self.at(*parts))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(text)
            temporary.replace(path)
        else:
            filesystem, remote = self._filesystem(*parts)
            with filesystem.open_output_stream(remote) as file:
                file.write(text)

    def remove(self, *parts: str) -> None:
        """Remove a file if it is there."""
        filesystem, path = self._filesystem(*parts)
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(path)

    def names(self, *parts: str) -> list[str]:
        """What lies directly in a folder, sorted; empty if there is no such folder."""
        from pyarrow.fs import FileSelector

        filesystem, path = self._filesystem(*parts)
        found = filesystem.get_file_info(FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def _filesystem(self, *parts: str) -> tuple[Any, str]:
        # pyarrow reads the standard AWS variables, AWS_ENDPOINT_URL among them, as Ray's own storage does.
        from pyarrow.fs import FileSystem

        return FileSystem.from_uri(self.at(*parts))


def scratch(name: str) -> Path:
    """A folder of this machine for ``name``, the same each time, short enough for sockets and lock files."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"zsr-{os.getuid()}" / digest
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
