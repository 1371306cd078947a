"""Laws of the suite's evaluation: every set that is there, the mean over the zero-shot ones, an estimate that follows from counts."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as command
from aft.cards import standard_error
from aft.clip import load_model
from aft.errors import AftError, ConfigError, DataError
from aft.evaluation import Cell, effort, evaluate, first, plan, zero_shot
from aft.evaluation.pages.tables import groups_of
from aft.evaluation.subsets import first_of_each
from tests.zero_shot_sets import colour, folders, given_folders

FAMILIES = {"toy": "toy", "cifar10": "cifar10", "sample": "cifar10", "imagenet": "imagenet", "imagenet_r": "imagenet",
            "tiny_imagenet32": "imagenet", "dtd": "dtd"}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sets: CIFAR-10 as class folders (two pictures each), EuroSAT in its own layout (one each)."""
    for file in ("1.png", "2.png"):
        folders(tmp_path / "data" / "cifar10" / "test", [f"thing_{number}" for number in range(10)], file, 32)
    folders(tmp_path / "data" / "eurosat" / "2750", given_folders("eurosat"), "1.jpg", 64)
    return tmp_path / "data"


def run(root: Path, out: Path, *more: str):
    """A small evaluation of the tiny model on all sets below a root."""
    return command.main(["--data", "datamodules.ZeroShotSuite", "--data.root", str(root), "--models", "{m: {name: tiny}}", "--out",
                         str(out), "--protocols", "[clean, pgd]", "--eps", "[1/255]", "--steps", "2", *more])  # fmt: skip


def test_every_set_that_is_there_is_measured(root: Path, tmp_path: Path, capsys) -> None:
    """n of each, or all; a card each at its own size; then means, what the others would take, and nothing twice."""
    made = run(root, tmp_path / "out", "--n", "15")
    told = [(*(card["data"][key] for key in ("name", "split", "n")), (card["threat"] or {}).get("resolution")) for _, card in made]
    assert told == [("cifar10", "test", 15, None), ("cifar10", "test", 15, 32), ("eurosat", "all", 10, None), ("eurosat", "all", 10, 64)]
    said = capsys.readouterr().out
    assert "2 of 21 sets are measured" in said and "Zero-shot mean" in said and "m: over cifar10, eurosat." in " ".join(said.split())
    assert "the 19 other sets, at" in said and "imagenet: 50,000 images" in said and "n = 15 of each, 285" in said
    (clean, attacked) = json.loads((tmp_path / "out" / "zero_shot.json").read_text())
    assert clean["sets"] == ["cifar10", "eurosat"] and clean["robust"] == {} and list(attacked["robust"]) == ["pgd"]
    assert clean["clean"][0] == pytest.approx(sum(card["clean_accuracy"] for _, card in made[::2]) / 2)
    assert run(root, tmp_path / "out", "--n", "15") == made


def test_sets_that_were_trained_on_are_not_counted(root: Path, tmp_path: Path, capsys) -> None:
    """Nor their family; the embedded sample is CIFAR-10. A name that is no model's is said, an id that is no set's refused."""
    run(root, tmp_path / "out", "--trained_on", "{m: [sample], other: []}")
    said = " ".join(capsys.readouterr().out.split())
    assert "m: over eurosat; not counted, since a model of this table was trained on it or its family: cifar10." in said
    assert "trained_on names other, which is no model of this table." in said
    with pytest.raises(AftError, match="unknown set in trained_on of m 'cifar'"):
        run(root, tmp_path / "out", "--trained_on", "{m: [cifar]}")


def test_label_spaces_go_to_the_sets_that_have_their_classes(root: Path, tmp_path: Path) -> None:
    """And to no other; one that fits nowhere is an error."""
    made = run(root, tmp_path / "out", "--label_spaces", "{all: null, few: [thing 1, thing 2, thing 3]}", "--protocols", "[clean]")
    assert [(card["data"]["name"], card["data"]["label_space"], card["data"]["n"]) for _, card in made] == [
        ("cifar10", "all", 20), ("cifar10", "few", 6), ("eurosat", "all", 10)]  # fmt: skip
    with pytest.raises(AftError, match="label spaces few: no set of cifar10, eurosat has all their classes"):
        run(root, tmp_path / "out", "--label_spaces", "{all: null, few: [thing 1, river]}")


def test_survivors_of_one_set_are_none_of_another(root: Path, tmp_path: Path) -> None:
    """Largest radius first: what is spared at the smaller radius survived the larger one on the same set."""
    made = run(root, tmp_path / "out", "--protocols", "[pgd]", "--eps", "[0.1/255, 1/255]", "--largest_first", "true")
    cells = {card["cell"]: card["data"]["name"] for _, card in made}
    spared = [(card["data"]["name"], cells[card["metrics"]["spared"]["cell"]]) for _, card in made if "spared" in card["metrics"]]
    assert sorted(spared) == [("cifar10", "cifar10"), ("eurosat", "eurosat")]


def test_the_pictures_reach_the_model_as_they_are(root: Path, tmp_path: Path) -> None:
    """Native pixels: what a label says, its picture shows."""
    from datamodules import ZeroShotSuite

    for data in ZeroShotSuite(str(root)).evaluation_sets("test"):
        whole = first(data)
        seen = (255 * whole.batch(range(10)).images.mean((2, 3))).round()
        assert torch.allclose(seen, torch.tensor([colour(int(label)) for label in whole.labels_N[:10]]).float(), atol=6)


def test_first_of_each_is_first(data) -> None:
    """n images, or all of a smaller set; n below 1 is refused."""
    small = replace(first(data, 8), name="small")
    for n, expected in ((5, (5, 5)), (20, (20, 8)), (None, (40, 8))):
        chosen = first_of_each([data, small], n, {"all": None})
        assert tuple(map(len, chosen)) == expected and chosen[0].index_N.tolist() == first(data, expected[0]).index_N.tolist()
    with pytest.raises(DataError, match="n = 0"):
        first_of_each([data, small], 0, {"all": None})


@pytest.fixture
def cards(model, data, tmp_path):
    """The same model on one set by a clean look and by PGD, as if on four sets, with other accuracies."""
    (clean, attacked) = (evaluate(Cell(model, first(data), plan(name, eps="1/255", steps=2, targets=2, classes=5)), tmp_path)
                         for name in ("clean", "pgd"))  # fmt: skip
    found = []
    for place, name in enumerate(("cifar10", "imagenet", "imagenet_r", "dtd")):
        for card in (clean, attacked):
            shares = {"clean": 0.5 + place / 10, "robust": None if card is clean else place / 10}
            errors = {key: None if share is None else standard_error(share, 40) for key, share in shares.items()}
            verdict = {"status": "suspect" if name == "dtd" else "reliable", "failed_checks": []}
            found.append(("m", {**card, "data": {**card["data"], "name": name}, "clean_accuracy": shares["clean"], "verdict": verdict,
                                "robust_accuracy": shares["robust"], "standard_error": errors}))
    return found


def test_the_mean_is_unweighted_over_zero_shot_sets(cards) -> None:
    """Its error that of a mean of independent shares, its verdict the worst; families go together."""
    clean, attacked = zero_shot.means(cards, FAMILIES, {"m": ["tiny_imagenet32"]})
    assert attacked.sets == ("cifar10", "dtd") and attacked.not_counted == ("imagenet", "imagenet_r") and attacked.n == 80
    errors = [standard_error(share, 40) for share in (0.0, 0.3)]
    assert attacked.robust["pgd"] == pytest.approx((0.15, (errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2))
    assert clean.clean[0] == attacked.clean[0] == pytest.approx((0.5 + 0.8) / 2) and attacked.verdict == "suspect"
    assert zero_shot.means(cards, FAMILIES, {"m": ["dtd"]})[1].verdict == "reliable"
    assert zero_shot.means(cards, FAMILIES, {})[1].chance == pytest.approx(0.2)


def test_without_a_set_that_counts_there_is_no_mean(cards) -> None:
    """While other processes still work on it: all means of a table are over the same sets, under the same protocols."""
    second = [(label, {**card, "protocol": {"name": "apgd", "fidelity": "exact"}}) for label, card in cards if card["threat"]]
    (clean, attacked) = zero_shot.means([*cards, *second[:-1]], FAMILIES, {})
    assert (attacked.sets, attacked.lacking, attacked.clean, attacked.robust) == ((), ("dtd",), None, {}) and len(clean.sets) == 4
    assert "(no mean without cards of dtd)" in zero_shot.footnotes([attacked])[1]


def test_what_one_model_has_seen_counts_for_none(cards) -> None:
    """Means of a table that are over other sets could not be compared."""
    other = [("other", {**card, "model": {**card["model"], "sha256": "f" * 64}}) for _, card in cards]
    found = zero_shot.means([*cards, *other], FAMILIES, {"other": ["imagenet"]})
    assert [(mean.label, mean.sets, mean.not_counted) for mean in found[::2]] == [
        (label, ("cifar10", "dtd"), ("imagenet", "imagenet_r")) for label in ("m", "other")]  # fmt: skip


def test_the_page_and_the_suite_have_one_rule(cards) -> None:
    """Of the same cards: the same sets, the same mean with the same error."""
    (_, attacked) = zero_shot.means(cards, FAMILIES, {"m": ["tiny_imagenet32"]})
    (group, *_) = groups_of(cards, ["tiny_imagenet32"], FAMILIES)
    (row,) = [row for row in group.rows if row.over]
    (number,) = row.robust["1/255"]
    assert (row.over, row.n, row.verdict) == (attacked.sets, attacked.n, attacked.verdict)
    assert (number.share, number.error) == attacked.robust["pgd"] and (row.clean.share, row.clean.error) == attacked.clean
    assert "imagenet, imagenet_r left out, since a model of this page was trained on it or its family" in group.notes[0]


def test_nothing_to_average_is_said(cards, tmp_path) -> None:
    """No figure, and no failure, where a model has seen all sets."""
    suite = type("Suite", (), {"families": FAMILIES, "sizes": {}, "evaluation_sets": None})()
    stream = io.StringIO()
    (mean, _) = zero_shot.conclude(cards, suite, {"m": ["cifar10", "imagenet", "dtd"]}, {"all": None}, None, tmp_path, stream)
    assert mean.sets == () and mean.clean is None and "m: over no set" in " ".join(stream.getvalue().split())


def test_what_a_model_was_trained_on(cards) -> None:
    """Known of the embedded weights and what was fine-tuned from them; of a fine-tuning it must be said, and is asked for if not."""
    embedded = load_model("miniclip32").record.sha256
    tuned = {"sha256": "0" * 64, "base_sha256": embedded, "method": "tecoa"}
    ours = [(label, {**card, "model": {**card["model"], **tuned}}) for label, card in cards]
    for trained_on, unknown in (({}, True), ({"m": []}, False)):
        mean = zero_shot.means(ours, FAMILIES, trained_on)[0]
        assert (mean.sets, mean.unknown) == (("cifar10", "dtd"), unknown)
        assert ("What it was fine-tuned on is not known" in zero_shot.footnotes([mean])[1]) == unknown
    base = [(label, {**card, "model": {**card["model"], "sha256": embedded}}) for label, card in cards]
    assert zero_shot.means(base, FAMILIES, {})[0].sets == ("cifar10", "dtd") and not zero_shot.means(base, FAMILIES, {})[0].unknown
    with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
        zero_shot.check_trained({"m": ["cifar1"]}, FAMILIES)


@pytest.mark.parametrize("name", ["clean", "pgd", "apgd", "strict", "tecoa"])
def test_a_robust_image_costs_what_its_attacks_steps_say(name, model, data, tmp_path) -> None:
    """At radius 0 nothing is broken: the forwards that were counted are those that the estimate takes for robust images."""
    protocol = plan(name, eps=0, steps=3, targets=2, classes=5)
    attacks = tuple(replace(one, attack=replace(one.attack, eps=0), share=1.0) for one in protocol.attacks)
    card = evaluate(Cell(model, first(data), replace(protocol, attacks=attacks)), tmp_path)
    right = round(40 * card["clean_accuracy"])
    assert card["robust_accuracy"] in (None, card["clean_accuracy"]) and 0 < right < 40
    assert card["cost"]["forwards"] == right * effort.full_forwards(card) + (40 - right)


def test_an_estimate_gives_back_what_was_measured(cards) -> None:
    """For as many images with the same share of robust ones: the seconds of the cards. More robust images take longer."""
    card = {**cards[1][1], "robust_accuracy": 0.25, "cost": {"forwards": 40 * 3, "backwards": 0, "seconds": 6.0, "device": "cpu"}}
    pace = effort.pace([card])
    assert pace.full == 1 + 3 + 1 and pace.early == pytest.approx((120 - 10 * 5) / 30) and pace.rate == 20
    assert pace.seconds(40) == pytest.approx(6) and pace.seconds(40, 1) == pytest.approx(40 * 5 / 20)
    assert pace.seconds(40, 0) < pace.seconds(40) < pace.seconds(40, 1)
    assert effort.pace([{**card, "attacks": [{**card["attacks"][0], "name": "fab_t"}]}]).seconds(80, 1) == pytest.approx(12)
    spared = effort.pace([{**card, "metrics": {"spared": {"images": 10}}}])
    assert spared.early == pytest.approx((120 - 10) / 30)


def test_the_estimate_adds_up(cards) -> None:
    """Over models, protocols and radii; n limits it; nothing is said where nothing is missing."""
    timed = [("m", {**card, "cost": {"forwards": 80, "backwards": 0, "seconds": 4.0, "device": "cpu"}}) for _, card in cards]
    head, *rows = effort.lines(timed, ["all"], {"cifar10": 40, "stl10": 400, "pcam": 4000}, 100)
    assert head.startswith("the 2 other sets, at 20 forwards a second") and len(rows) == 4
    assert rows[0].startswith("  stl10: 400 images 80 s (") and rows[-2].startswith("  all images, 4,400: 14.7 min")
    assert rows[-1].startswith("  n = 100 of each, 200: 40 s")
    assert effort.lines(timed[::2], ["all"], {"stl10": 400}, None)[1] == "  stl10: 400 images 40 s"  # nothing depends on robustness
    assert effort.lines(timed, ["all"], {"cifar10": 40}, None) == [] and effort.lines(timed, [], {"stl10": 1}, None) == []
    assert [effort.span(seconds) for seconds in (1, 119, 120, 7200, 3600, 172800)] == ["1 s", "119 s", "2.0 min", "2.0 h", "1.0 h", "2.0 d"]
