"""Laws of the report: no figure without n, error and verdict; it fits 80 columns, and no control codes reach a file."""

from __future__ import annotations

import csv
import io
import json
import shutil

import pytest

from aft.errors import DataError
from aft.evaluation import Cell, evaluate, first, plan, report
from aft.evaluation.picture import draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the cards of ``labelled`` are written."""
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def labelled(make, folder):
    """Two models, two protocols, two radii, two label spaces."""
    found, (make_model, make_data) = [], make
    for label, seed in (("before", 0), ("after", 1)):
        model = make_model(seed)
        data = make_data(model)
        for space, names in (("all", None), ("seen", data.class_names[:3])):
            subset = first(data, None, names, space)
            for name in ("pgd", "apgd"):
                for eps in ("1/255", "4/255"):
                    protocol = plan(name, eps=eps, steps=2, targets=2, classes=len(subset.class_names))
                    found.append((label, evaluate(Cell(model, subset, protocol), folder, label)))
    return found


def printed(labelled, **settings):
    """The table as a file gets it."""
    stream = io.StringIO()
    report.show(labelled, stream, **settings)
    return stream.getvalue()


def test_the_table_fits_80_columns_and_has_no_control_codes(labelled, monkeypatch):
    """Also with wide figures, several failed checks, and a long label."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    doubt = {"status": "suspect", "failed_checks": ["E1", "E2"]}
    long = [("a-rather-long-name-of-a-model", {**card, "verdict": doubt}) for _, card in labelled]
    for cards_, words in ((labelled, "unchecked"), (long, "E1 E2")):
        text = printed(cards_, width=80)
        assert max(map(len, text.splitlines())) <= 80 and words in text
        assert "\x1b" not in text and "\r" not in text


def test_every_figure_stands_with_what_it_needs(labelled):
    """Each row has n, both robust columns with errors, the share of the top class and a verdict; steps, targets, chance stand beneath."""
    text = printed(labelled, width=200)
    rows = [line for line in text.splitlines() if line.startswith(("before", "after"))]
    assert len(rows) == 8 and all(line.count("±") == 3 and "unchecked" in line and "/255" in line for line in rows)
    for _, card in labelled:
        assert any(report.percent(card["robust_accuracy"], card["standard_error"]["robust"]) in row for row in rows)
    for words in ("apgd_ce (2 steps) + apgd_t (2 steps, 2 targets) (all)", "apgd_ce (2 steps) + apgd_margin (2 steps) (seen)",
                  "toy seen 33.3 %", "toy all 20.0 %", "pgd2 (2 steps)", "native pixels at 6 px"):  # fmt: skip
        assert words in text


def test_a_usual_table_has_a_line_a_row_and_n_beneath_or_beside(labelled):
    """At 80 columns nothing is folded; n has a column where rows differ in it, else a line."""
    card = labelled[0][1]
    usual = [("before", {**card, "data": {**card["data"], "name": "sample", "label_space": "unseen", "n": 1000}})]
    assert "before  sample unseen  1/255" in printed(usual, width=80) and "n = 1,000 images in each row" in printed(usual)
    assert "in each row" not in printed(labelled) and "  n  " in printed(labelled).splitlines()[0]


def test_many_protocols_have_rows_of_their_own(labelled):
    """So that five of them can be read at 80 columns: each line has its protocol, its radius and one robust figure, none cut short."""
    names = ("pgd", "apgd", "strict", "autoattack_standard", "tecoa")
    many = [("m", {**labelled[0][1], "protocol": {"name": name, "fidelity": "like" if name == "tecoa" else "exact"}}) for name in names]
    text = printed(many, width=80)
    lines = [line for line in text.splitlines() if line.startswith("m ")]
    assert len(lines) == 5 and all(line.count("±") == 2 for line in lines) and "tecoa-like" in lines[4]
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_a_row_shows_the_worst_verdict_and_share_of_its_cards(labelled):
    """One suspect card is enough."""
    doubtful = {**labelled[0][1], "verdict": {"status": "suspect", "failed_checks": ["E2"]}, "largest_class_share": 0.99}
    row, below = printed([("before", doubtful), *labelled[1:]], width=200).splitlines()[2:4]
    assert "suspect" in row and " 99 " in row and below.strip() == "E2"


def test_clean_cards_have_a_row_without_a_radius(model, data, tmp_path):
    """A dash where there is no attack, and nothing to draw."""
    found = [("m", evaluate(Cell(model, first(data), plan("clean", eps=0, steps=1, targets=1, classes=5)), tmp_path))]
    assert "75.0 ±6.8" in printed(found) and "n = 40 images in each row" in printed(found)
    assert draw(found, tmp_path / "a.png") is None and not (tmp_path / "a.png").exists()


def test_cards_are_found_again_and_told_apart(labelled, folder, tmp_path):
    """Labels are folders; two weights under one label get the beginning of their hash. No cards is an error."""
    shutil.copytree(folder / "cards", tmp_path / "cards")
    assert sorted(report.load([tmp_path / "cards"]), key=str) == sorted(labelled, key=str)
    (tmp_path / "cards" / "before").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        path.rename(tmp_path / "cards" / "after" / path.name)
    hashes = {card["model"]["sha256"][:6] for _, card in labelled}
    assert len(hashes) == 2 and {label for label, _ in report.load([tmp_path / "cards"])} == {f"after@{begin}" for begin in hashes}
    with pytest.raises(DataError, match="no cards below"):
        report.load([tmp_path / "moved"])


def test_the_csv_has_every_card_unrounded(labelled, tmp_path):
    """One line a card, with n, error, chance and verdict."""
    rows = list(csv.DictReader(report.write_csv(labelled, tmp_path / "t.csv").open()))
    needed = ("n", "chance", "verdict", "robust_standard_error", "cell")
    assert len(rows) == 8 * 2 and all(row[name] for row in rows for name in needed)
    for row, (label, card) in zip(rows, labelled, strict=True):
        assert (row["label"], float(row["robust_accuracy"]), float(row["eps"])) == (label, card["robust_accuracy"], card["threat"]["eps"])


def test_the_picture_has_a_panel_a_label_space_and_a_line_a_protocol(labelled, tmp_path, monkeypatch):
    """With bars, chance, n and verdict in the legend."""
    from matplotlib.figure import Figure

    figures = []
    real = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda self, *a, **k: figures.append(self) or real(self, *a, **k))
    path = draw(labelled, tmp_path / "p.png")
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    axes = figures[0].axes
    assert [a.get_title().split(",")[0] for a in axes] == ["toy all", "toy seen"]
    texts = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert texts == [f"{label}, {name}, n = 40 (unchecked)" for label in ("before", "after") for name in ("pgd", "apgd")]
    assert "chance 20.0 %" in [t.get_text() for t in axes[0].texts]


def test_cards_that_disagree_about_a_cell_are_refused(labelled, folder, tmp_path):
    """Both are named; equal copies are no matter."""
    first_card = next((folder / "cards").rglob("*.json"))
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        shutil.copy(first_card, tmp_path / place / "card.json")
    assert len(report.load([tmp_path])) == 2
    text = (tmp_path / "b" / "card.json").read_text()
    changed = json.loads(text)
    changed["clean_accuracy"] = 0.123
    (tmp_path / "b" / "card.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match="a/card.json and .*b/card.json measured the same and differ"):
        report.load([tmp_path])
