"""A comparison of objectives: what is run, what is chosen, what is written, and that finished work is not done twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from zsr.config import apply_overrides, load_tree, validate
from zsr.launch.compare import _settle, main, parse
from zsr.launch.compare_report import BEGIN, END, checks, insert, publish, tables
from zsr.launch.compare_waves import UNTOUCHED, Compare, Comparison, Measure, score
from zsr.launch.store import Store


@pytest.fixture
def comparison(small_shards: Path) -> Comparison:
    attacks = {
        "PGD": {"name": "pgd", "steps": 2, "step_size_of_eps": 0.5},
        "APGD": {"name": "apgd", "steps": 3},
    }
    return Comparison(
        name="both",
        preset="demo",
        objectives={"tecoa": (("optim.lr=1e-3",), ("optim.lr=1e-6",)), "clean": (("optim.lr=1e-3",),)},
        measures=(
            Measure(
                "robustness", (str(small_shards),), ("1/255", "4/255"), attacks, defence={"name": "ttc"}, num_samples=12
            ),
            Measure("apgd", (str(small_shards),), ("4/255",), {"APGD": attacks["APGD"]}, num_samples=6, num_seeds=1),
        ),
        search_settings=("train.max_steps=1",),
        seeds=(0, 1),
    )


@pytest.fixture
def tree(tiny_model_name: str, small_shards: Path, tmp_path: Path):
    settings = [f"model.name={tiny_model_name}", f"data.train={small_shards}", f"data.val={small_shards}"]
    settings += ["train.max_steps=2", "train.batch_size=10", "eval.num_samples=10", "eval.attack.steps=1"]
    return apply_overrides(load_tree("demo"), [*settings, "launch.workers=1", f"launch.storage={tmp_path}"])


class Here:
    """Runs jobs in this process; notes which, and fails those that it is told to."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.ran = fail, []

    def __call__(self, jobs, take) -> None:
        for job in jobs:
            self.ran.append((job.kind, job.title))
            if self.fail and self.fail in job.title:
                take(job, RuntimeError("the worker died"))
                continue
            take(job, job.function(**job.arguments))


def test_it_searches_trains_and_measures_and_does_nothing_twice(comparison, tree, tmp_path, capsys):
    store, config = Store(str(tmp_path / "both")), validate(tree)
    first = Here()
    outcome = Compare(comparison, tree, store, first).run()
    assert [kind for kind, _ in first.ran] == ["search"] * 3 + ["train"] * 4 + ["robustness"] * 5 + ["apgd"] * 3
    assert set(outcome.runs) == {UNTOUCHED, "tecoa", "clean"} and not outcome.failed
    assert [run["seed"] for run in outcome.runs["tecoa"]] == [0, 1]
    assert [list(run["measured"]) for run in outcome.runs["tecoa"]] == [["robustness", "apgd"], ["robustness"]]
    (measured,) = outcome.runs["tecoa"][0]["measured"]["robustness"].values()
    assert measured["samples"] == 12 and set(measured["robust"]) == {
        "PGD 1/255",
        "PGD 4/255",
        "APGD 1/255",
        "APGD 4/255",
    }
    assert 0 <= measured["defended"]["robust"]["APGD 4/255"] <= measured["defended"]["clean"] <= 1
    assert "stops-early" in {finding["id"] for finding in measured["defended"]["findings"]}
    assert all(finding["level"] in ("warn", "fail") for finding in measured["findings"])
    said = capsys.readouterr().out
    assert "eta=" in said and "check=stops-early:warn" in said

    publish(outcome, comparison, config, store, tmp_path / "docs" / "report.md")
    text = (tmp_path / "docs" / "report.md").read_text()
    assert text.startswith(BEGIN) and "| tecoa |" in text and "ttc" in text and UNTOUCHED in text
    assert (tmp_path / "both" / "results" / "tables.md").read_text().strip() in text

    again = Here()
    assert Compare(comparison, tree, store, again).run().runs == outcome.runs
    assert again.ran == []
    # Another attack is measured anew; nothing is trained again.
    first, second = comparison.measures
    stronger = dataclasses.replace(first, eps=("2/255",))
    Compare(dataclasses.replace(comparison, measures=(stronger, second)), tree, store, again).run()
    assert {kind for kind, _ in again.ran} == {"robustness"}
    # Another seed is measured beside those that are done.
    more = Here()
    wider = dataclasses.replace(second, num_seeds=2)
    Compare(dataclasses.replace(comparison, measures=(first, wider)), tree, store, more).run()
    assert more.ran == [("apgd", "tecoa-seed1"), ("apgd", "clean-seed1")]


def test_a_job_is_known_by_the_settings_that_are_not_defaults(comparison, tree, tmp_path):
    store = Store(str(tmp_path))
    written = validate(
        tree
    ).model_dump()  # with every setting; ``tree`` is what a version that has fewer would have written
    measure = comparison.measures[0]
    old, new = (
        Compare(comparison, one, store, Here())._measure(measure, "tecoa", None, one) for one in (tree, written)
    )
    assert old.arguments != new.arguments and old.id == new.id
    seventh = apply_overrides(tree, ["seed=7"])
    other = Compare(comparison, tree, store, Here())._measure(measure, "tecoa", None, seventh)
    assert other.id != new.id


def test_a_failed_job_is_named_and_tried_again_next_time(comparison, tree, tmp_path):
    store = Store(str(tmp_path / "both"))
    outcome = Compare(comparison, tree, store, Here(fail="tecoa-seed1")).run()
    assert list(outcome.failed.values()) == ["the worker died"]
    assert [run["seed"] for run in outcome.runs["tecoa"]] == [0]
    again = Here()
    assert not Compare(comparison, tree, store, again).run().failed
    assert again.ran == [("train", "tecoa-seed1"), ("robustness", "tecoa-seed1")]


def test_a_candidate_is_chosen_by_clean_and_robust_accuracy_unless_it_is_flagged():
    def result(clean, robust, flags=()):
        return {"metrics": {"val/clean_acc": clean, "val/robust_acc": robust}, "flags": list(flags)}

    assert score(result(0.5, 0.3)) == pytest.approx(0.4)
    assert score(result(0.5, 0.5, ["zero_grad_frac=1>0.05"])) == score(None) == 0
    assert score({"metrics": {}, "flags": ["diverged"]}) == 0


def test_checks_see_what_cannot_be():
    measure = Measure("robustness", ("set",), ("1", "2"), {"weak": {}, "strong": {}})

    def found(weak, strong, blind=0.0):
        robust = {**dict(zip(measure.columns("weak"), weak)), **dict(zip(measure.columns("strong"), strong))}
        measured = {"samples": 100, "clean": 0.5, "robust": robust, "zero_grad_frac": {"weak 1": blind}}
        return checks({"flags": [], "measured": {"robustness": {"set": measured}}}, [measure])

    assert found([0.4, 0.3], [0.4, 0.2]) == [] == found([0.3, 0.31], [0.31, 0.2])  # one image more is noise
    assert found([0.3, 0.35], [0.3, 0.2]) == ["set: weak does less harm with a larger budget"]
    assert found([0.3, 0.2], [0.3, 0.25]) == ["set: weak does more harm than strong"]
    assert found([0.3, 0.2], [0.3, 0.2], blind=0.5) == ["set: 50% of images without a gradient"]
    assert found([0.6, 0.2], [0.3, 0.2]) == ["set: robust above clean"]


def test_checks_repeat_what_the_measurement_found_without_and_with_the_defence():
    masked = {"id": "zero-gradients", "level": "fail", "sentence": "weak 1: 9 of 10", "value": 0.9}
    again = {**masked, "sentence": "weak 2: 8 of 10"}
    early = {"id": "stops-early", "level": "warn", "sentence": "apgd stops", "value": None}
    numbers = {"samples": 100, "clean": 0.5, "robust": {"weak 1": 0.3}, "zero_grad_frac": {}}
    measured = {**numbers, "findings": [masked, again], "defended": {**numbers, "findings": [early]}}
    run = {"flags": [], "measured": {"robustness": {"set": measured}}}
    said = checks(run, [Measure("robustness", ("set",), ("1",), {"weak": {}})])
    assert said == ["set: fail zero-gradients", "set, defended: warn stops-early"]


def test_mean_and_spread_over_seeds(comparison):
    first, second = comparison.measures
    columns = [column for attack in ("PGD", "APGD") for column in first.columns(attack)]

    def run(seed, clean):
        numbers = {
            "chance": 0.2,
            "samples": 12,
            "clean": clean,
            "robust": dict.fromkeys(columns, 0.0),
        }
        withstood = {**numbers, "zero_grad_frac": {}, "defended": numbers}
        withstood["robust"] = {**numbers["robust"], "PGD 1/255": 0.25, "APGD 1/255": 1 / 6}
        measured = {"robustness": {first.sets[0]: withstood}}
        return {"seed": seed, "measured": measured, "flags": [], "train_s": 2.0, "units": 3}

    from zsr.launch.compare_waves import Outcome

    outcome = Outcome({"clean": ("optim.lr=1e-3",)}, {"clean": [run(0, 0.5), run(1, 0.6)]})
    text = tables(outcome, comparison)
    assert "| clean | 55.0 ± 7.1 | 25.0 ± 0.0 | 0.0 ± 0.0 |" in text  # 7.07 = 10 / sqrt(2)
    assert "samples that withstand: PGD 6, APGD 4." in text  # 3 and 2 of 12 samples, for each seed
    assert f"{second.sets[0]}: apgd\n\nNothing was measured." in text
    assert "| clean | optim.lr=1e-3 | 3 | 2 | 2 | none raised |" in text
    assert "| tecoa | no run to be believed" in text


def test_a_report_keeps_what_people_wrote_around_the_tables(tmp_path):
    report = tmp_path / "comparison.md"
    insert(report, "one")
    report.write_text(f"# Title\n\n{report.read_text()}\nWhat it shows.\n")
    insert(report, "two")
    assert report.read_text() == f"# Title\n\n{BEGIN}\ntwo\n{END}\n\nWhat it shows.\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--objectives", "tecoaa"], "tecoaa is not compared here; did you mean 'tecoa'?"),
        (["--objectives", "fare"], "fare is not compared here; there are tecoa, clean"),
        (["launch.storage=s3://bucket/x"], "launch.storage=s3://bucket/x: a comparison keeps its runs in a folder"),
        (["train.max_steps=0"], "train.max_steps=0: a comparison gives every objective the same number of steps"),
        (["optim.lrr=1"], "did you mean optim.lr"),
    ],
)
def test_mistakes_get_a_sentence(comparison, arguments, sentence, capsys):
    assert main(comparison, [*arguments, "--dry-run"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_dry_run_starts_nothing(comparison, tmp_path, capsys):
    assert main(comparison, ["--dry-run", f"launch.storage={tmp_path / 'none'}", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "jobs=11" in out and "dry_run=done" in out and not (tmp_path / "none").exists()


def test_options_of_the_command_line_change_what_is_compared(comparison):
    asked = parse(comparison, ["--objectives", "clean", "--num-samples", "5", "--name", "other"])
    settled, config, _ = _settle(comparison, asked)
    assert list(settled.objectives) == ["clean"] and [one.num_samples for one in settled.measures] == [5, 5]
    assert config.name == settled.name == config.tracking.experiment == "other"
