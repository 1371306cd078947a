"""Laws of ``eval.py`` with defences: weights x defences, three figures side by side wherever they are shown, and clear refusals."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

import eval as command
from aft.clip import load_model
from aft.defenses import DefenseSpec
from aft.errors import AftError
from aft.evaluation import adaptive, report
from aft.evaluation.behind import crossed
from aft.evaluation.defended_report import figure, robust_n, rows_of

MODEL = "{m: {name: tiny}}"
WORDS = ["--data", "datamodules.Sample", "--models", MODEL, "--n", "8", "--eps", "[4/255]"]


@pytest.fixture
def quick(monkeypatch):
    """The protocols of defences with three steps and few draws."""
    def shorter(made):
        """Three steps."""
        return lambda budget: tuple(replace(one, attack=replace(one.attack, steps=3)) for one in made(budget))

    for name in ("oblivious", "adaptive_small"):
        monkeypatch.setitem(command.plan.__globals__["PROTOCOLS"], name, shorter(adaptive.DEFENDED[name]))
    small = replace(adaptive.SMALL, selection=2, scoring=2, most_draws=2, query_draws=2, pilot=3)
    monkeypatch.setitem(adaptive.PLANS, "adaptive_small", small)
    monkeypatch.setitem(adaptive.PLANS, "oblivious", small)


def test_defences_are_crossed_with_weights_and_shown_side_by_side(tmp_path, capsys, quick):
    """One row a defence, of the card that knows most; the page, the Markdown and the CSV have undefended, oblivious and adaptive too."""
    defenses = "{blur: {name: low_pass, settings: {sigma: 0.5}}, noise: {name: noise}}"
    words = [*WORDS, "--defenses", defenses, "--protocols", "[oblivious, adaptive_small]", "--out", str(tmp_path)]
    made = command.main(words)
    assert [label for label, _ in made] == ["m+blur", "m+blur", "m+noise", "m+noise"]
    assert made[0][1]["defense"]["settings"] == {"sigma": 0.5} and made[2][1]["defense"]["name"] == "noise"
    said = " ".join(capsys.readouterr().out.split())
    assert "undef. %" in said and "obliv. %" in said and "adapt. %" in said and "E33" in said and "a_apgd_ce" in said
    assert [card["protocol"]["name"] for _, card in rows_of(made)] == ["adaptive_small", "adaptive_small"]
    again = command.main(words)
    assert again == made, "what is finished is not measured again"
    capsys.readouterr()
    command.main(["report", "--cards", str(tmp_path / "cards")])
    with (tmp_path / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert all(row["undefended_accuracy"] and row["oblivious_accuracy"] and row["cost_multiplier"] for row in rows)
    assert sum(bool(row["adaptive_accuracy"]) for row in rows) == 2 and not (tmp_path / "accuracy.png").exists()
    told = made[1][1]["metrics"]["defended"]
    for name in ("report.html", "report.md"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        figures = [figure(told[key]).split("\n")[0] for key in ("undefended", "oblivious", "adaptive")]
        assert "Behind a defence" in page and all(one in page for one in figures)
    assert robust_n(made[1][1]) == told["adaptive"]["n"]


def test_processes_that_share_a_defence_are_told_of_its_second_round(tmp_path, monkeypatch, capsys, quick):
    """It begins when all of the first is there: nobody shows a table the first time, though nobody was stopped."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    made, said = [], []
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        words = [*WORDS, "--eps", "[0.001/255]", "--defense", "low_pass", "--protocols", "[adaptive_small]", "--out", str(tmp_path)]
        made.append(command.main(words))
        said.append(capsys.readouterr().out)
    assert [len(cards) for cards in made] == [0, 0, 1]
    assert all("still has its second round before it" in text and "the same command goes on" in text for text in said[:2])


@pytest.mark.filterwarnings("ignore:clipure_cos_release")
def test_every_kind_of_defence_goes_through_the_small_protocol(tmp_path, quick):
    """Those that climb, draw, gate and couple: each card is whole, and the released CLIPure's is suspect for its batch."""
    names = ("ttc", "aom", "anti_adversary", "tte", "clipure_cos_closed", "clipure_cos_sane", "clipure_cos_release")
    given = "{" + ", ".join(f"{name}: {{name: {name}}}" for name in names) + "}"
    words = [*WORDS[:4], "--n", "3", "--eps", "[1/255]", "--defenses", given, "--protocols", "[adaptive_small]", "--out", str(tmp_path)]
    cards = {label.partition("+")[2]: card for label, card in command.main(words)}
    assert set(cards) == set(names) and all(card["metrics"]["defended"]["adaptive"]["n"] == 3 for card in cards.values())
    assert (cards["ttc"]["defense"]["gate_rates"] is not None) and cards["ttc"]["defense"]["cost_multiplier"] > 5
    assert "E8" in cards["clipure_cos_release"]["verdict"]["failed_checks"] and cards["tte"]["defense"]["cost_multiplier"] > 10


def test_one_defence_by_its_id(tmp_path, quick):
    """Also with settings; a plain model's cards stay in the plain table beside it."""
    given = {"low_pass": {"sigma": 0.75}, "{name: low_pass, settings: {sigma: 1.0}}": {"sigma": 1.0}}
    for place, (words, settings) in enumerate(given.items()):
        ((label, card),) = command.main([*WORDS, "--defense", words, "--protocols", "[oblivious]", "--out", str(tmp_path / str(place))])
        assert label == "m+low_pass" and card["defense"]["settings"] == settings
    (plain,) = command.main([*WORDS, "--protocols", "[clean]", "--out", str(tmp_path / "plain")])
    report.show([plain, (label, card)])


MISTAKES = {
    "--defense low_pas --protocols [oblivious]": "did you mean 'low_pass'",
    "--defense low_pass --protocols [apgd]": "take oblivious, adaptive_small, adaptive",
    "--protocols [adaptive_small]": "behind a defence: give --defense",
    "--defense low_pass --defenses {a:{name:noise}} --protocols [oblivious]": "give one of them",
    "--defenses {} --protocols [oblivious]": "defenses is empty",
    "--defenses {a:{name:noise,settings:{scal:0.1}}} --protocols [oblivious]": "did you mean 'scale'",
    "--defense low_pass --protocols [oblivious] --largest_first true --eps [1/255,2/255]": "leave out largest_first",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_named(words, tmp_path, quick):
    """With what is allowed."""
    spaced = words.replace(":", ": ").replace(": {name", ": {name")
    parts = []
    for word in spaced.split(" --"):
        key, _, value = word.removeprefix("--").partition(" ")
        parts += [f"--{key}", value]
    with pytest.raises(AftError, match=MISTAKES[words]):
        command.main([*WORDS, *parts, "--out", str(tmp_path)])


def test_one_defence_after_the_other_over_all_weights(model):
    """In the order of the file, so that a table that is not finished has whole columns."""
    other = load_model("tiny")
    specs = {"b": DefenseSpec("low_pass"), "a": DefenseSpec("noise")}
    made = crossed([("one", model), ("two", other)], ["adaptive_small"], None, specs)
    assert [label for label, _ in made] == ["one+b", "two+b", "one+a", "two+a"]
    assert [defended.undefended for _, defended in made] == [model, other, model, other]
