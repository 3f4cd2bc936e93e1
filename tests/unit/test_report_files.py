"""The files of a report: whole pages, nothing from outside, what must be marked is marked, bad input is a sentence."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from card_factory import make_card, store, store_examples
from typer.testing import CliRunner

from zsr.attacks.checks import Finding
from zsr.cli.main import app, main
from zsr.eval.card import find_cards
from zsr.eval.report import write_report

VOID = {"meta", "br", "img", "input", "use", "link", "path"}


class Page(HTMLParser):
    """Reads a page: elements that stay open, ids, inner links, what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"][1:]] if found.get("href", "").startswith("#") else []
        loads = [found.get("src", ""), found.get("href", "") if tag in ("link", "image") else ""]
        self.loads += [one for one in loads if one and not one.startswith("data:")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two models on two sets, one behind a defence, one that failed a check, one with an awkward name."""
    folder, out = tmp_path_factory.mktemp("cards"), tmp_path_factory.mktemp("report")
    failed = Finding(id="zero-gradients", level="fail", sentence="12 % had no input gradient.", value=0.12)
    blind = {"knowledge": "oblivious"}
    cards = [make_card("base", name, 30, eps=eps) for name in ("pets", "cars") for eps in (1, 4)]
    cards += [make_card("base", "pets", 50, eps=4, defense="ttc", attack=blind)]
    cards += [
        make_card("a<b>_&|x", "pets", 60, eps=4, checks=[failed]),
        make_card("a<b>_&|x", "pets", 44, eps=4, seed=1),
    ]
    store(cards, folder)
    for card in cards[3:6]:
        store_examples(card, folder)
    write_report([folder], out, title="Mine & yours", baseline="base")
    return out


def test_the_page_is_whole_and_loads_nothing(made: Path) -> None:
    text = (made / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and page.loads == []
    assert len(page.ids) == len(set(page.ids)) and set(page.links) <= set(page.ids)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    assert "a<b>" not in text and "a<b>_&|x" in " ".join(page.words)


def test_the_page_marks_what_must_not_be_taken_for_more_than_it_is(made: Path) -> None:
    text = (made / "report.html").read_text()
    assert re.search(r'class="failed "><s>52.0</s>.*?href="#check-zero-gradients"', text)  # the mean of 60 and 44
    assert re.search(r"50\.0<sup[^>]*does not know the defence", text)
    assert "12 % had no input gradient." in text
    assert len(re.findall(r'role="img" aria-label="[^"]{40,}"', text)) == text.count("<svg")


def test_markdown_marks_them_too_and_its_pictures_exist(made: Path) -> None:
    text = (made / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| a\\<b\\>"))
    assert row.count("|") - row.count("\\|") == 5 or "\\|x" in row
    assert "~~52.0~~" in text and "[zero-gradients](#zero-gradients)" in text and '<a id="zero-gradients">' in text
    assert "50.0 (40.4-59.6) +20.0 o |" not in text  # the baseline has no number in that column
    assert re.search(r"50\.0 \(40\.4-59\.6\) o \|", text)
    pictures = re.findall(r"!\[.*?\]\((plots/[^)]+)\)", text)
    assert len(pictures) > 5 and all((made / picture).stat().st_size for picture in pictures)
    assert any("examples-" in picture for picture in pictures)


def test_the_csv_has_a_line_for_each_card(made: Path) -> None:
    lines = list(csv.DictReader(io.StringIO((made / "report.csv").read_text())))
    assert len(lines) == 7 and {line["robust_count"] for line in lines} == {"30", "50", "60", "44"}
    flagged = next(line for line in lines if line["failed"])
    assert (flagged["believed"], flagged["failed"], flagged["robust"]) == ("False", "zero-gradients", "0.6")
    assert flagged["survivors"] == "apgd-ce=65/100 square=60/100"


def test_latex_is_escaped_and_balanced(made: Path) -> None:
    text = (made / "report.tex").read_text()
    assert (
        r"a\textless{}b\textgreater{}\_\&\textbar{}x" in text
        and r"(52.0)\textsuperscript{a}" in text
        and r"50.0\textsuperscript{o}" in text
    )
    tables = re.findall(r"\\begin\{tabular\}\{l(r+)\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL)
    assert len(tables) == 4  # clean, two budgets, the larger once more with an attack that does not know the defence
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    for table in tables:
        rows = [line for line in table[1].splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert all(len(re.findall(r"(?<!\\)&", row)) == len(table[0]) for row in rows)


def test_a_report_of_the_same_cards_is_the_same(tmp_path: Path) -> None:
    store([make_card("a"), make_card("b", robust=50)], tmp_path / "cards")
    texts = []
    for name in ("one", "two"):
        write_report([tmp_path / "cards"], tmp_path / name, formats=["html"])
        texts.append((tmp_path / name / "report.html").read_bytes())
    assert texts[0] == texts[1]


def test_wide_inputs_wrap(tmp_path: Path) -> None:
    cards = [make_card(f"model-{m}", f"set-{s:02}", 40) for m in range(2) for s in range(20)]
    store(cards, tmp_path / "cards")
    write_report([tmp_path / "cards"], tmp_path, formats=["latex", "csv"])
    widths = [len(width) for width in re.findall(r"\\begin\{tabular\}\{l(r+)\}", (tmp_path / "report.tex").read_text())]
    assert max(widths) <= 5 and sum(widths) == 2 * 21  # clean and one budget, 20 sets and their mean
    assert not (tmp_path / "plots").exists()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store([make_card("a"), make_card("b")], tmp_path / "cards")
    result = CliRunner().invoke(
        app, ["report", str(tmp_path / "cards"), "--out", str(tmp_path / "out"), "--format", "csv, latex"]
    )
    assert result.exit_code == 0 and "cards=2 rows=2 protocols=1 failed_checks=0" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.csv", "report.tex"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "there is no such file or folder"),
        (["empty"], "no result card"),
        (["broken"], "is no result card"),
        (["cards", "--format", "pdf"], "--format pdf: is not known; choose from html, md, csv, latex"),
        (["cards", "--format", ","], "--format: names none"),
        (["cards", "--baseline", "c"], "--baseline c: there is no such row, only a"),
        (["cards", "--format", "md"], "holds no example images"),
    ],
)
def test_bad_input_is_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    card = make_card("a")
    store([card], Path("cards"))
    store_examples(card, Path("cards")).write_bytes(b"PK broken")
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/x.card.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments, "--out", "out"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not Path("out").exists()


def test_examples_are_of_one_attack_and_norm_and_there_of_the_largest_budget(tmp_path: Path) -> None:
    from zsr.eval.report.examples import find_examples, pick_examples
    from zsr.eval.report.grid import make_rows

    l2 = {"norm": "l2", "name": "pgd", "title": "PGD-10"}
    cards = [make_card(model, eps=eps) for model in ("a", "b") for eps in (1, 4, 2)]
    cards += [
        make_card(model, eps=128, attack=l2) for model in ("a", "b")
    ]  # 128/255 in L2 is no larger than 4/255 in L-inf
    cards += [make_card("a", eps=8, attack={"name": "square", "title": "Square"})]  # no other row has it
    store(cards, tmp_path)
    for card in cards:
        store_examples(card, tmp_path)
    rows, row_of = make_rows(cards)
    picked, _ = pick_examples(cards, find_examples([tmp_path]), rows, row_of)
    shown = [(one.row.label, one.card.attack.title, one.card.attack.eps_text) for one in picked if one.card.attack]
    assert shown == [("a", "AutoAttack", "4/255"), ("b", "AutoAttack", "4/255")]


def test_copies_of_a_card_are_one_and_contradictions_are_named(tmp_path: Path) -> None:
    card = make_card(robust=40)
    newer = card.model_copy(
        update={"created": "2026-02-01T00:00:00Z", "checks": [Finding(id="tie", level="ok", sentence="s")]}
    )
    places = [store([one], tmp_path / name) for name, one in (("new", newer), ("old", card))]
    assert find_cards(places) == [newer] == find_cards(reversed(places))
    other = card.model_copy(update={"robust": make_card(robust=41).robust})
    with pytest.raises(ValueError, match=f"id {card.id}.* with different numbers; remove") as fault:
        find_cards([*places, store([other], tmp_path / "other")])
    assert str(tmp_path / "new") in str(fault.value) and str(tmp_path / "other") in str(fault.value)
    (tmp_path / "bytes.card.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.card\.json is no result card"):
        find_cards([tmp_path / "bytes.card.json"])


def test_examples_show_the_perturbation_amplified(tmp_path: Path) -> None:
    from zsr.eval.report.examples import load_examples
    from zsr.eval.report.grid import make_rows

    card = make_card("a", eps=4)
    store([card], tmp_path)
    rows, _ = make_rows([card])
    found = load_examples(store_examples(card, tmp_path), card, rows[0], 4)
    assert found.factor == 31  # the largest whole number that keeps 31 * 4/255 under a half
    assert {int(value) for value in np.unique(found.samples[0].perturbation)} <= {3, 4, 251, 252}
    assert [sample.attacked_right for sample in found.samples] == [False, False, True, True]
    assert (found.samples[0].truth, found.samples[0].attacked_says) == ("cat & <dog>", "red_fox")
