"""Laws of differences: beyond two standard errors or not at all, paired where the same images stand beside both cards."""

from __future__ import annotations

import math

import pytest

from aft.evaluation.collect import collect
from aft.evaluation.compare import Difference, compare, gaps
from tests.made_up_cards import made_up, stored, verdicts


@pytest.mark.parametrize(
    ("difference", "error", "outcome"),
    [(0.21, 0.1, "better"), (-0.21, 0.1, "worse"), (0.19, 0.1, "within the error"), (-0.2, 0.1, "within the error"), (0, 0, "the same"),
     (0, 0.1, "within the error"), (0.01, 0, "better")],
)  # fmt: skip
def test_the_rule(difference, error, outcome):
    """Exactly two standard errors are within."""
    assert Difference(difference, error, False).outcome == outcome


def pair(tmp_path, old, new, old_right=None, new_right=None, shift=0):
    """Two reports of one card each."""
    for name, card, right, start in (("old", old, old_right, 0), ("new", new, new_right, shift)):
        stored(tmp_path / name, "m", card, table=None if right is None else verdicts(right, start))
    return compare(collect([tmp_path / "new"]), collect([tmp_path / "old"]))


def test_the_same_images_are_compared_one_by_one(tmp_path):
    """Five of a hundred more and none less: certain when paired, nothing when not. Weights may differ."""
    old, new = [1] * 25 + [0] * 75, [1] * 30 + [0] * 70
    cards_ = made_up(1.0, 0.25), made_up(1.0, 0.30, sha256="f" * 64)
    of = {change.kind: change.of for change in pair(tmp_path / "paired", *cards_, old, new).changes}
    assert of["robust"].paired and of["robust"].outcome == "better" and of["clean"].outcome == "the same"
    assert (of["robust"].difference, of["robust"].error) == pytest.approx((0.05, math.sqrt(0.05 * 0.95 / 100)))
    for name, rights in (("alone", (None, None)), ("half", (old, None))):
        (robust,) = (change.of for change in pair(tmp_path / name, *cards_, *rights).changes if change.kind == "robust")
        assert not robust.paired and robust.outcome == "within the error"
        assert robust.error == pytest.approx(math.hypot(math.sqrt(0.25 * 0.75 / 100), math.sqrt(0.3 * 0.7 / 100)))


def test_other_images_are_not_paired_and_order_does_not_matter(tmp_path):
    """By the images' stable numbers."""
    right = [1] * 25 + [0] * 75
    cards_ = made_up(1.0, 0.25), made_up(1.0, 0.25)
    assert not pair(tmp_path / "other", *cards_, right, right, shift=1).changes[1].of.paired
    turned = {name: column[::-1] for name, column in verdicts(right).items()}
    stored(tmp_path / "turned", "m", cards_[0], table=turned)
    stored(tmp_path / "straight", "m", cards_[1], table=verdicts(right))
    found = compare(collect([tmp_path / "turned"]), collect([tmp_path / "straight"]))
    assert [(change.of.paired, change.of.outcome) for change in found.changes] == [(True, "the same")] * 2


def test_only_the_same_question_is_compared(tmp_path):
    """Another radius, protocol, data set, steps or label is another cell; other weights or n are not. Clean figures are told once."""
    for eps in (1, 2):
        stored(tmp_path / "old", "m", made_up(eps=eps / 255))
        stored(tmp_path / "new", "m", made_up(eps=eps / 255, sha256="e" * 64, n=400))
    others = (made_up(eps=4 / 255), made_up(protocol="pgd"), made_up(data="else"), made_up(steps=20), made_up(norm="l2"))
    for card in others:
        stored(tmp_path / "new", "m", {**card, "model": {**card["model"], "sha256": "e" * 64}})
    stored(tmp_path / "old", "n", made_up())
    found = compare(collect([tmp_path / "new"]), collect([tmp_path / "old"]))
    assert sorted((change.kind, change.what) for change in found.changes) == [
        ("clean", "toy all"), ("robust", "toy all, apgd 1/255"), ("robust", "toy all, apgd 2/255")]  # fmt: skip
    assert len(found.only_new) == len(others) and [label for label, _ in found.only_old] == ["n"]
    lines = "\n".join(found.lines())
    assert "2 standard errors" in lines and "5 cards here alone, 1 there alone" in lines and lines.count("n = 400") == 3


def test_a_number_from_outside_is_none_of_ours(tmp_path):
    """Differences are between what the cards measured."""
    old = made_up()
    (_, robust) = pair(tmp_path, old, {**old, "external": {"robust_accuracy": 0.0, "source": "somebody"}}).changes
    assert robust.of.difference == 0


def test_the_gap_is_of_the_same_model_images_and_radius(tmp_path):
    """Paired by image; two radii are two gaps; a protocol of both kinds is neither."""
    for eps, left in ((1 / 255, 28), (2 / 255, 25)):
        for protocol, right in (("pgd", 30), ("apgd", left)):
            stored(tmp_path, "m", made_up(1.0, right / 100, eps, protocol=protocol), table=verdicts([1] * right + [0] * (100 - right)))
    stored(tmp_path, "m", made_up(protocol="square"))
    stored(tmp_path, "alone", made_up(protocol="pgd", data="else"))
    found = gaps(collect([tmp_path]))
    assert sorted(round(gap.of.difference, 6) for gap in found) == [0.02, 0.05] and all(gap.of.paired for gap in found)
    assert {(gap.pgd["protocol"]["name"], gap.apgd["protocol"]["name"]) for gap in found} == {("pgd", "apgd")}
