"""Laws of finding cards: all that can be shown is, all that cannot is named with its reason, and nothing is counted twice."""

from __future__ import annotations

import json

import pytest

from aft.errors import DataError
from aft.evaluation.collect import collect
from tests.made_up_cards import made_up, stored


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path):
    """Cut off, partial, of another schema, without a number; JSON of another kind is no card and is passed over."""
    good = stored(tmp_path, "m", made_up())
    text = good.read_text()
    bad = {
        "cut": text[: len(text) // 2],
        "partial": text.replace('"complete"', '"partial"'),
        "newer": text.replace("aft.card/1", "aft.card/2"),
        "empty": text.replace('"robust_accuracy": 0.25', '"robust_accuracy": null'),
    }
    for name, content in bad.items():
        good.with_name(f"{name}.json").write_text(content)
    good.with_name("other.json").write_text(json.dumps({"threads": 2}))
    good.with_name("list.json").write_text("[1, 2]")
    found = collect([tmp_path])
    assert [label for label, _ in found.labelled] == ["m"] and found.paths == [good]
    why = {one.path.stem: one.why for one in found.unread}
    words = {"cut": "half written", "partial": "status partial", "newer": "'aft.card/2' is not", "empty": "robust_accuracy None"}
    assert why.keys() == words.keys() and all(words[name] in why[name] for name in words)


def test_no_card_at_all_and_no_such_folder_say_what_to_do(tmp_path):
    """Also where every card is damaged: the first is named."""
    with pytest.raises(DataError, match="gone does not exist: give folders"):
        collect([tmp_path / "gone"])
    with pytest.raises(DataError, match="no cards below .*: give folders that eval.py evaluate wrote cards to.$"):
        collect([tmp_path])
    stored(tmp_path, "m", made_up()).write_text("{")
    with pytest.raises(DataError, match="no cards below .* 1 could not be read; the first, .*half written"):
        collect([tmp_path])


def test_copies_under_one_label_are_shown_once_and_that_with_an_external_number_stays(tmp_path):
    """In two folders, or in one that is given twice, or in one inside the other."""
    card = made_up()
    told = {**card, "external": {"robust_accuracy": 0.1, "source": "somebody"}}
    stored(tmp_path / "a", "m", card)
    stored(tmp_path / "b", "m", told)
    stored(tmp_path / "b", "other", card)
    found = collect([tmp_path / "a", tmp_path / "b", tmp_path / "b" / "cards"])
    assert [(label, one["external"] is None) for label, one in found.labelled] == [("m", False), ("other", True)] and found.repeated == 1


def test_cards_that_disagree_are_refused_also_across_folders(tmp_path):
    """Both are named."""
    card = made_up()
    stored(tmp_path / "a", "m", card)
    stored(tmp_path / "b", "m", {**card, "robust_accuracy": 0.3})
    with pytest.raises(DataError, match="measured the same and differ"):
        collect([tmp_path / "a", tmp_path / "b"])


def test_a_file_may_be_given_and_other_files_are_passed_over(tmp_path):
    """As ``runs/*`` gives them."""
    path = stored(tmp_path, "m", made_up())
    (tmp_path / "log.txt").write_text("nothing")
    assert len(collect([path, tmp_path / "log.txt"]).labelled) == 1
