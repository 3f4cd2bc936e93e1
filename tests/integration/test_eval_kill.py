"""zsr eval killed in the middle of a cascade: the same command goes on, loses at most one batch and changes no verdict."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from zsr.cli.main import main
from zsr.eval.card import find_cards
from zsr.eval.ledger import Line

# Two more processes that load torch: half a minute on an idle machine, and many times that on a busy one.
pytestmark = pytest.mark.timeout(1800)

# Writes down each finished batch before its line is in the ledger, and takes its time over attacked ones.
_WATCHED = """
import os, sys, time
import zsr
from zsr.cli.main import main
from zsr.eval.scene import Scene
real = Scene.do
def do(self, request, batch=None):
    answer = real(self, request, batch)
    if request.attack is not None:
        with open(sys.argv[1], "a") as diary:
            diary.write(f"{request.stage} {len(request.ids)}\\n")
        time.sleep(0.1)
    return answer
Scene.do = do
main(sys.argv[2:])
"""


def test_a_killed_evaluation_loses_at_most_one_batch_and_changes_nothing(tmp_path):
    options = [
        "eval",
        "--model",
        "zsr:emoji-vit",
        "--data",
        "zsr:emoji/train",
        "--num-samples",
        "12",
        "--batch-size",
        "3",
        "--attack",
        "aa",
    ]
    options += ["--eps", "2/255", "--steps", "3", "--no-probes"]
    options += [part for setting in ("queries=12", "target_classes=2") for part in ("--attack-set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name: str, out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _WATCHED, str(tmp_path / name), *options, "--out", str(tmp_path / out)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def lines_of(out: str) -> list[Line]:
        return [
            line
            for path in (tmp_path / out).rglob("*.verdicts.jsonl")
            for line in (Line(**json.loads(text)) for text in path.read_text().splitlines()[1:])
            if line.stage >= 0
        ]

    killed = start("first", "cards")
    deadline = time.monotonic() + 600
    while not (tmp_path / "first").exists() or len((tmp_path / "first").read_text().splitlines()) < 8:
        assert killed.poll() is None and time.monotonic() < deadline, killed.stderr and killed.stderr.read().decode()
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before = lines_of("cards")
    finished = len((tmp_path / "first").read_text().splitlines())
    assert finished - 1 <= len(before) <= finished
    assert not find_cards([tmp_path / "cards"]) and {line.stage for line in before} > {0}

    assert start("second", "cards").wait(600) == 0
    with pytest.raises(SystemExit) as stopped:
        main([*options, "--out", str(tmp_path / "uninterrupted")])
    assert not stopped.value.code
    after, whole = lines_of("cards"), lines_of("uninterrupted")
    assert after[: len(before)] == before
    assert len((tmp_path / "second").read_text().splitlines()) == len(after) - len(before)
    for stage in {line.stage for line in whole}:
        done = [sorted(s for line in lines if line.stage == stage for s in line.ids) for lines in (after, whole)]
        assert done[0] == done[1]
    (card,), (expected,) = (find_cards([tmp_path / name]) for name in ("cards", "uninterrupted"))
    assert (card.id, card.clean, card.robust, card.survivors) == (
        expected.id,
        expected.clean,
        expected.robust,
        expected.survivors,
    )
    examples = [np.load(next((tmp_path / name).rglob("*.examples.npz"))) for name in ("cards", "uninterrupted")]
    for name in examples[0].files:
        if name == "attacked":
            np.testing.assert_allclose(examples[0][name], examples[1][name], atol=1e-4)
        else:
            np.testing.assert_array_equal(examples[0][name], examples[1][name])
