"""zsr eval over Ray workers: the verdicts of a local run, also where a worker dies in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from eval_bench import cascade, make_scene, plain, run_cascade
from ray_support import local_cluster

from zsr.cli.main import main
from zsr.eval.card import find_cards
from zsr.eval.ledger import CLEAN
from zsr.eval.scene import Request

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster():
        yield


def test_two_workers_give_the_verdicts_of_one_process(tiny_model_name: str, small_shards: Path) -> None:
    from zsr.launch.evaluate import RayCrew

    scene, attack = make_scene(tiny_model_name, small_shards), cascade("1/255")
    alone = run_cascade(scene, attack, batch_size=4)
    assert alone[1].attacked.sum() > 0
    with RayCrew(2, on_gpu=False) as crew:
        assert plain(*run_cascade(scene, attack, batch_size=4, crew=crew)) == plain(*alone)
    assert ray.is_initialized()  # the cluster was there before


def test_a_batch_whose_worker_dies_is_done_again(tiny_model_name: str, small_shards: Path) -> None:
    from zsr.launch.evaluate import RayCrew

    scene = make_scene(tiny_model_name, small_shards)
    requests = [Request(CLEAN, [sample], ("bare",)) for sample in range(50)]
    with RayCrew(2, on_gpu=False) as crew:
        victim = ray.get(crew._workers[0].__ray_call__.remote(lambda worker: os.getpid()))
        done = []
        for answer in crew.run(scene, requests):
            done += answer.line.ids
            if len(done) == 5:
                os.kill(victim, signal.SIGKILL)
        assert sorted(done) == list(range(50))
        assert ray.get(crew._workers[0].__ray_call__.remote(lambda worker: os.getpid())) != victim


def test_the_command_writes_the_same_card_with_workers(
    tiny_model_name: str, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = []
    for name, workers in (("local", []), ("ray", ["--workers", "2"])):
        order = ["eval", "--model", tiny_model_name, "--data", str(small_shards), "--eps", "1/255", "--steps", "2"]
        order += ["--defense", "ttc", "--batch-size", "8", "--no-probes", "--out", str(tmp_path / name), *workers]
        with pytest.raises(SystemExit) as stopped:
            main(order)
        assert not stopped.value.code, capsys.readouterr().err
        cards.append({card.id: card for card in find_cards([tmp_path / name])})
    local, over_ray = cards
    assert len(local) == 2 and set(local) == set(over_ray)
    for key, card in local.items():
        assert (over_ray[key].clean, over_ray[key].robust) == (card.clean, card.robust)
        assert over_ray[key].checks == card.checks
        assert (card.cost.workers, over_ray[key].cost.workers) == (1, 2)

    order[order.index("2", order.index("--workers"))] = "99"
    with pytest.raises(SystemExit):
        main([*order[: order.index("--out")], "--out", str(tmp_path / "many"), "--workers", "99"])
    assert "--workers 99: the cluster has" in capsys.readouterr().err
