"""zsr eval --attack: which attack the options mean, what is said where they mean none, and AutoAttack's table."""

from __future__ import annotations

import pytest

from zsr.cli.attacks import attack_title, read_attacks, suite_attacks
from zsr.cli.main import main
from zsr.config import ConfigError
from zsr.data.suite import load_suite
from zsr.eval.card import find_cards


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_options_become_settings_and_pgd_steps_a_quarter_of_each_budget():
    found = read_attacks("pgd", "1/255, 4/255", norm="linf")
    assert list(found) == ["1/255", "4/255"]
    for label, eps in (("1/255", 1 / 255), ("4/255", 4 / 255)):
        config = found[label].config
        assert (config.eps, config.step_size, config.steps, config.best_iterate) == (eps, eps / 4, 10, True)
    (last,) = read_attacks("pgd", "1/255", norm="linf", settings=["best_iterate=false"]).values()
    assert not last.config.best_iterate
    (config,) = (attack.config for attack in read_attacks("cw", "1", norm="l2", steps=3, step_size="1/2").values())
    assert (config.name, config.norm, config.step_size, config.steps) == ("cw", "l2", 0.5, 3)
    (attack,) = read_attacks("apgd", "4/255", norm="linf", restarts=2, settings=["loss=dlr"]).values()
    assert (attack.config.loss, attack.config.steps, attack.config.restarts) == ("dlr", 100, 2)


def test_aa_is_autoattack_in_the_authors_order_and_custom_stages_can_be_listed():
    (attack,) = read_attacks("aa", "4/255", norm="linf").values()
    assert attack.stages == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert attack_title(attack) == "AutoAttack standard (apgd-ce, apgd-t, fab-t, square)"
    listed = ["version=custom", "attacks=[apgd-ce,apgd-t]"]
    (attack,) = read_attacks("autoattack", "4/255", norm="linf", settings=listed).values()
    assert attack.stages == ("apgd-ce", "apgd-t")
    assert attack_title(next(iter(read_attacks("pgd", "1/255", norm="linf", steps=7).values()))) == "PGD-7"
    assert attack_title(next(iter(read_attacks("square", "1/255", norm="linf").values()))) == "SQUARE-5000"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "pdg"}, "--attack pdg: is not a known attack; did you mean 'pgd'"),
        ({"name": "apgd", "step_size": "1/255"}, "--step-size: apgd has no such setting; leave it out"),
        ({"name": "square", "steps": 5}, "--steps: square has no such setting; leave it out"),
        ({"name": "apgd", "settings": ["loss"]}, "--attack-set loss: should be key=value"),
        (
            {"name": "pgd", "settings": ["eps=8/255"]},
            "--attack-set eps=8/255: the budget is what --eps says; leave it out",
        ),
        (
            {"name": "aa", "settings": ["aa.norm=l2"], "others": ["aa"]},
            "--attack-set norm=l2: the ball is what --norm says",
        ),
        ({"name": "cw", "settings": ["schedule.name=linear"]}, "schedule.name=linear: epsilon moves in training alone"),
        ({"name": "fab", "settings": ["schedule=linear"]}, "schedule=linear: epsilon moves in training alone"),
        ({"name": "apgd", "settings": ["loss=dlt"]}, "--attack apgd: loss='dlt'"),
        ({"name": "aa", "settings": ["version=custom"]}, r"attacks: the custom version needs stages, such as"),
        ({"name": "aa", "settings": ["attacks=[square]"]}, "attacks: version=standard has its own"),
        ({"name": "pgd", "eps": "2/x"}, "--eps 2/x: should be a number or a fraction such as 2/255"),
        ({"name": "pgd", "eps": " , "}, "--eps: names no budget"),
        ({"name": "apgd", "eps": "4"}, "write 4/255"),
    ],
)
def test_mistakes_are_answered_with_the_option_and_the_way_out(options, says):
    with pytest.raises((ValueError, ConfigError), match=says):
        read_attacks(options.pop("name"), options.pop("eps", "4/255"), norm="linf", **options)


def test_autoattack_reports_what_is_left_after_each_stage(tiny_model_name, small_shards, tmp_path, capsys):
    options = ["--attack", "aa", "--steps", 2, "--attack-set", "queries=5", "--attack-set", "target_classes=2"]
    assert call(
        "eval", "--model", tiny_model_name, "--data", small_shards, "--eps", "1/255", "--out", tmp_path, *options
    ) == 0  # fmt: skip
    (card,) = find_cards([tmp_path])
    after = {stage: share.value for stage, share in card.survivors.items()}
    assert list(after) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert card.clean.value >= after["apgd-ce"] >= after["apgd-t"] >= after["fab-t"] >= after["square"]
    assert card.robust is not None and after["square"] == card.robust.value
    said = " ".join(capsys.readouterr().out.split())  # the table's title wraps
    assert "AutoAttack standard (apgd-ce, apgd-t, fab-t, square)" in said
    assert f"1/255: after apgd-ce {100 * after['apgd-ce']:.1f}, apgd-t" in said


def test_settings_of_one_of_several_attacks():
    options = {"norm": "linf", "settings": ["aa.queries=7", "steps=3", "apgd.restarts=2"], "others": ["aa", "apgd"]}
    (cascade,) = read_attacks("aa", "1/255", **options).values()
    assert (cascade.config.queries, cascade.config.steps, cascade.config.restarts) == (7, 3, 1)
    (single,) = read_attacks("apgd", "1/255", **options).values()
    assert (single.config.steps, single.config.restarts) == (3, 2)


def test_a_suites_own_attacks_and_budgets_unless_options_say_otherwise():
    protocol = load_suite("tga16").protocol
    none = {"norm": "linf", "steps": None, "step_size": None, "restarts": None}
    found, words = suite_attacks(protocol, None, given=none, settings=[])
    assert [label for label, _ in found] == 3 * ["1/255", "2/255", "4/255"]
    assert {attack.config.name for _, attack in found} == {"pgd", "cw", "autoattack"}
    pgd, cascade = found[2][1].config, found[-1][1]
    assert (pgd.steps, pgd.step_size, pgd.eps) == (100, 1 / 255, 4 / 255)
    assert cascade.stages == ("apgd-ce", "apgd-dlr")
    assert words == ["suite tga16: steps, step_size, confidence of cw are not known; zsr's own are taken"]
    given = none | {"steps": 5}
    found, words = suite_attacks(protocol, "3/255", given=given, settings=["restarts=2"])
    assert [(label, attack.config.steps) for label, attack in found[:2]] == [("3/255", 5), ("3/255", 5)]
    assert (found[0][1].config.step_size, found[0][1].config.restarts) == (1 / 255, 2)
    tecoa, words = suite_attacks(load_suite("tecoa16").protocol, None, given=none, settings=[])
    assert len(tecoa) == 9 and "suite tecoa16: eps, steps, step_size of pgd are not known" in words[0]
