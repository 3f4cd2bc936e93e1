"""Train on several gloo processes of this machine, without Ray: ``python tests/two_ranks.py CONFIG FOLDER RANK WORLD STOP``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

TIMEOUT_S = 120


def run_ranks(config: object, folder: Path, world_size: int, stop_after_reports: int = 0) -> None:
    """Run a config on ``world_size`` processes; resumes from ``folder`` if it holds a checkpoint.

    Raises:
        AssertionError: a process failed; with what it printed.
    """
    from zsr.config import to_yaml

    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "config.yaml"
    config_file.write_text(to_yaml(config))  # type: ignore[arg-type]
    (folder / "rendezvous").unlink(missing_ok=True)
    command = [sys.executable, __file__, str(config_file), str(folder)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(stop_after_reports)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output


def main(config_file: str, folder: str, rank: str, world_size: str, stop_after_reports: str) -> None:
    import torch.distributed as dist

    from zsr.config import load_config
    from zsr.engine.loop import train
    from zsr.engine.session import LocalSession

    class GlooSession(LocalSession):
        left = int(stop_after_reports)

        def report(self, metrics: dict[str, float], checkpoint: Callable[[Path], None] | None) -> None:
            super().report(metrics, checkpoint)
            self.left -= 1
            if self.left == 0:
                self.close()
            dist.barrier()
            if self.left == 0:
                os._exit(0)  # as a machine that is taken away: no clean-up

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(rank),
        world_size=int(world_size),
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    session = GlooSession(Path(folder))
    session.rank, session.world_size, session.local_rank = int(rank), int(world_size), int(rank)
    train(load_config(config_file), session, None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
