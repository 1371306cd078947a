"""What ``docs/defenses.md`` says of the measured defences is what the committed cards say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aft.errors import DataError
from bench import defenses_report
from bench.page import fill

ANY_CARD = next((defenses_report.CARDS / "tecoa_noise").glob("*.json"))


def put(folder: Path, weights: str, name: str, low: float, high: float, **verdict: Any) -> None:
    """A card made from a real one, with this interval of the gain."""
    card = json.loads(ANY_CARD.read_text())
    card["defense"]["name"] = name
    card["metrics"]["defended"]["gain"] |= {"mean": (low + high) / 2, "low": low, "high": high, "helps": low > 0}
    card["verdict"] |= verdict
    (folder / f"{weights}_{name}").mkdir(parents=True)
    (folder / f"{weights}_{name}" / "card.json").write_text(json.dumps(card))


def test_the_page_is_what_the_committed_cards_make(tmp_path: Path) -> None:
    """The command writes what stands there already."""
    page = tmp_path / "defenses.md"
    page.write_bytes(defenses_report.PAGE.read_bytes())
    fill(page, "bench.defenses_report", defenses_report.text_of(defenses_report.CARDS))
    assert page.read_text() == defenses_report.PAGE.read_text()


def test_every_measured_cell_is_in_the_tables() -> None:
    """Of the settings' pairs, each that has a card, with its own figure."""
    text = defenses_report.text_of(defenses_report.CARDS)
    for folder in sorted(path for path in defenses_report.CARDS.iterdir() if "_" in path.name.removeprefix("tga_zsr")):
        for path in folder.glob("*adaptive_small*.json"):
            card = json.loads(path.read_text())
            line = next(line for line in text.splitlines() if line.startswith(f"| `{card['defense']['name']}`"))
            assert f"{100 * card['robust_accuracy']:.1f} ±" in line, path


def test_words_follow_from_the_intervals(tmp_path: Path) -> None:
    """Helping and harming need the whole interval on one side; a suspect cell is named with its check."""
    put(tmp_path, "miniclip32", "noise", 0.02, 0.06)
    put(tmp_path, "tecoa", "low_pass", -0.06, -0.02, status="suspect", failed_checks=["E8"])
    put(tmp_path, "fare", "aom", -0.02, 0.06)
    text = defenses_report.text_of(tmp_path)
    interval = "by the 95 % interval of the difference over images, in 1 of 3 cells"
    assert f"helps, {interval}: `noise` on miniclip32 (+4.0 points, +2.0 to +6.0)." in text
    assert f"harms, {interval}: `low_pass` on tecoa (-4.0 points, -6.0 to -2.0)." in text
    assert "Suspect cells: 1, of `low_pass` (E8)." in text and text.count(", +4.0") == 1 and text.count(", harms") == 1


def test_two_cards_of_a_pair_or_one_of_another_protocol_are_refused(tmp_path: Path) -> None:
    """None of them silently wins."""
    put(tmp_path, "tecoa", "noise", 0.1, 0.2)
    (card,) = (tmp_path / "tecoa_noise").glob("*.json")
    pairs = (["tecoa"], ["noise"])
    assert list(defenses_report.cells_of(tmp_path, *pairs)) == [("tecoa", "noise")]
    (card.parent / "again.json").write_bytes(card.read_bytes())
    with pytest.raises(DataError, match="one card for each pair"):
        defenses_report.cells_of(tmp_path, *pairs)
    (card.parent / "again.json").unlink()
    told = json.loads(card.read_text())
    told["metrics"]["defended"].pop("adaptive")
    card.write_text(json.dumps(told))
    with pytest.raises(DataError, match="of a defence under adaptive attacks"):
        defenses_report.cells_of(tmp_path, *pairs)


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    """An empty folder gives tables without figures, and no sentence."""
    text = defenses_report.text_of(tmp_path)
    assert defenses_report.MISSING in text and "A defence" not in text and not any(mark in text for mark in ("±", "%"))
