"""What a run ran on: Python, packages, source commit, machine. Kept with every run, so that it can be run again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import zsr

COMMIT_VARIABLE = "ZSR_COMMIT"
"""Carries the commit to jobs that run in a copy of the source tree without its history."""


def describe_environment() -> dict[str, Any]:
    """Versions of Python and every installed package, the source commit if known, processor and GPUs."""
    return {
        "zsr": zsr.__version__,
        "commit": source_commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
        "packages": {item.metadata["Name"]: item.version for item in sorted(metadata.distributions(), key=_name)},
    }


def versions() -> dict[str, str]:
    """The short form, for a result card: versions of zsr and of what computes, the commit, the platform."""
    packages = {
        name: metadata.version(package) for name, package in (("torch", "torch"), ("open_clip", "open_clip_torch"))
    }
    return {
        "zsr": zsr.__version__,
        **packages,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": source_commit() or "unknown",
    }


def source_commit() -> str | None:
    """The commit of the source tree, with ``-dirty`` if files differ from it; ``None`` outside a git checkout."""
    if os.environ.get(COMMIT_VARIABLE):
        return os.environ[COMMIT_VARIABLE]
    folder = Path(zsr.__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")  # asked only where the run has loaded torch anyway
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _name(item: metadata.Distribution) -> str:
    return str(item.metadata["Name"]).lower()
