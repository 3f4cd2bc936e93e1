"""``zsr objectives`` says what the code says."""

from __future__ import annotations

import json

import pytest

from zsr.cli.main import main
from zsr.config import OBJECTIVES


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["objectives", *arguments])
    assert ended.value.code == 0


def test_every_objective_is_listed_with_paper_equation_cost_and_options(capsys):
    run()
    out = capsys.readouterr().out
    for name in OBJECTIVES.names():
        block = out.partition(f"{name}: ")[2].partition("\n\n")[0]
        assert "L = " in block and "units; options: " in block, name
        for option in OBJECTIVES.config_class(name).model_fields:
            assert option == "name" or f"{option}=" in block


def test_one_objective_in_full(capsys):
    run("tima")
    out = capsys.readouterr().out
    assert "**Uncertain**" in out and "margin_sign=distant of distant, similar\n      Which wrong classes" in out


def test_json_has_everything(capsys):
    run("--json")
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert sorted(found) == OBJECTIVES.names()
    assert found["tecoa"]["units"] == 7 and "ICLR 2023" in found["tecoa"]["title"]


def test_an_unknown_name_gets_a_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["objectives", "timaa"])
    assert ended.value.code == 2
    assert "timaa is not a known objective; did you mean 'tima'?" in capsys.readouterr().err
