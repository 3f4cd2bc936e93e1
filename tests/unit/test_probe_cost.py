"""What the probes of a measurement take is counted."""

from __future__ import annotations

from pathlib import Path

from card_factory import make_card
from eval_bench import make_scene

from zsr.attacks.pgd import PGD, PGDConfig
from zsr.eval import measure
from zsr.eval.ledger import Ledger
from zsr.eval.plan import Blank, Job
from zsr.eval.runner import Clean, classify_clean, run_attack
from zsr.eval.scene import count_passes


def test_probes_count_their_passes(tiny_model_name: str, small_shards: Path) -> None:
    scene, card = make_scene(tiny_model_name, small_shards, num_samples=8), make_card()
    attack = PGD(PGDConfig(eps="1/255", step_size="1/255", steps=1))
    verdicts = run_attack(scene, attack, classify_clean(scene, {"bare": Ledger(None, "")}), Ledger(None, ""))
    clean = Clean({"bare": scene.images.label}, {"bare": []})  # whatever it answers, there is something to look at
    job = Job(Path(), attack, {"bare": Blank(card.protocol, card.dataset, card.model, None, card.attack, 0)})
    with count_passes(scene.target.towers) as passes:
        spent = measure._probed(scene, job, clean, verdicts, wanted=True)["bare"]
    assert spent.passes == passes[0] > 0 and spent.seconds > 0 and spent.findings
    spared = measure._probed(scene, job, clean, verdicts, wanted=False)["bare"]
    assert (spared.passes, spared.seconds) == (0, 0)
