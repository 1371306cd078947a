"""The choice of settings: its rules on made-up rows, and a whole round on a tiny model with an attack that is handed in."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from aft.attacks import margin
from aft.batch import EvaluationSet
from aft.clip.stages import encode_in_stages
from aft.defenses import DEFENSES, DefenseSpec, defend, settings_of
from aft.errors import ConfigError
from bench import calibrate_defenses as bench
from tests.conftest import MemoryData


def row(clean: float, robust: float, name: str, gates: tuple[float, ...] = ()) -> dict:
    """A candidate's figures; the share of attacked images for which each of its gates opens."""
    rates = {"clean": {}, "attacked": {str(place): rate for place, rate in enumerate(gates)}}
    return {"settings": {"name": name}, "clean": {"percent": clean}, "robust": {"percent": robust}, "gate_rates": rates}


@pytest.fixture
def seen(model):
    """Twelve images of three classes."""
    data = MemoryData()
    rows = torch.arange(len(data.labels))
    whole = EvaluationSet("memory", "holdout", data.images, data.labels, rows, data.class_lists["train"], data.templates)
    return bench.Images(model, whole, 12, seed=0)


def upwards(model, text_KD, images, labels, keys, *, eps, steps):
    """One step of BPDA, and a note of what it was asked for."""
    upwards.asked = (eps, steps, model.defense)
    from aft.clip.stages import draws_for

    with torch.enable_grad():
        x = images.clone().requires_grad_(True)
        logits = model.logits(encode_in_stages(model, x, draws_for("attack", keys)[0], bpda=list(model.stages.declared)), text_KD)
        (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), x)
    return (images + eps * slope.sign()).clamp(0, 1)


def test_the_most_robust_of_those_that_keep_clean_accuracy_is_chosen():
    """Ties go to the cleaner one; where all cost too much none is chosen; what never acts is no candidate."""
    rows = {"undefended": [row(30, 2, "")], "a": [row(24, 20, "dear"), row(26, 9, "good"), row(29, 9, "better"), row(30, 4, "weak")],
            "b": [row(24.9, 30, "dear")], "c": [row(30, 9, "its noise alone", (0.0,)), row(30, 8, "acts", (0.0, 0.1))]}  # fmt: skip
    assert bench.chosen(rows, 5) == {"a": {"name": "better"}, "b": None, "c": {"name": "acts"}}


def test_candidates_are_measured_under_the_attack_that_is_handed_in(model, seen):
    """Each through its own stages, with what was settled without an attack under a candidate's own settings."""
    given = {"candidates": {"low_pass": [{"sigma": 0.5}], "ttc": [{}, {"threshold": 0.0}]}, "eps": "8/255", "steps": 20, "draws": 2}
    rows = bench.attacked(model, seen, given, {"ttc": {"threshold": 0.4}}, upwards)
    assert upwards.asked[:2] == (8 / 255, 20) and upwards.asked[2]["settings"]["threshold"] == 0.0
    assert [len(found) for found in rows.values()] == [1, 1, 2]
    for found in (one for some in rows.values() for one in some):
        assert 0 <= found["robust"]["percent"] <= found["clean"]["percent"] <= 100
        assert found["attacked"] >= 0.1199 * found["clean"]["percent"]
    assert rows["ttc"][1]["gate_rates"] == {"clean": {"pixels": 0.0}, "attacked": {"pixels": 0.0}}
    assert rows["ttc"][0]["gate_rates"]["clean"]["pixels"] > 0


def test_no_defence_is_tuned_longer_than_the_others_and_no_attack_leaves_the_ball(model, seen):
    """Seven candidates, or images beyond eps, are refused."""
    given = {"candidates": {"low_pass": [{"sigma": 0.1 * turn} for turn in range(7)]}, "eps": "1/255", "steps": 1, "draws": 1}
    with pytest.raises(ConfigError, match="low_pass has 7 candidates"):
        bench.attacked(model, seen, given, {}, upwards)
    with pytest.raises(ConfigError, match="left the ball"):
        bench.measured(model, seen, given, lambda model, text, images, *rest, **settings: 1 - images)


def test_images_that_are_wrong_when_clean_are_not_attacked(model, seen):
    """They count as not robust; the others are found what they are found beside them."""
    given, shown = {"eps": "8/255", "steps": 3, "draws": 3}, []

    def attack(*args, **settings):
        """Notes the labels."""
        shown.append(args[3])
        return bench.bpda_and_eot(*args, **settings)

    for defended in (model, defend(model, "noise", scale="32/255")):
        told = bench.measured(defended, seen, given, attack)
        clean = seen.right(defended, seen.shown_nCHW, 3)
        assert 0 < len(shown[-1]) == int((clean > 0).sum()) < 12
        text_KD = defended.text_bank(seen.names, seen.templates)
        every = bench.bpda_and_eot(defended, text_KD, seen.shown_nCHW, seen.labels_n, seen.keys_n, eps=8 / 255, steps=3)
        if defended is model:  # of a random one the number of draws is a median over the images
            assert told["robust"] == bench.share(torch.minimum(clean, seen.right(defended, every, 3)))
        assert told["robust"]["percent"] <= told["clean"]["percent"]


def test_a_candidate_that_is_done_is_not_measured_again(model, seen, tmp_path):
    """By model, images, settings and attack; a killed run goes on with the next one."""
    given = {"candidates": {"low_pass": [{"sigma": 0.5}]}, "eps": "8/255", "steps": 2, "draws": 1}
    calls = []

    def attack(*args, **settings):
        """Counts, and dies at the second candidate."""
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return upwards(*args, **settings)

    kept = tmp_path / "kept.json"
    with pytest.raises(KeyboardInterrupt):
        bench.attacked(model, seen, given, {}, attack, kept)
    rows = bench.attacked(model, seen, given, {}, attack, kept)
    assert len(calls) == 3 and rows == bench.attacked(model, seen, given, {}, attack, kept) and len(calls) == 3
    bench.attacked(model, seen, {**given, "steps": 3}, {}, attack, kept)
    assert len(calls) == 5


def test_a_candidate_is_what_its_defence_says_that_it_is(model, seen, tmp_path, monkeypatch):
    """Also by what no setting of the recipe names, such as the prior that ships; other class texts are another candidate, too."""
    given = {"candidates": {"low_pass": [{}]}, "eps": "8/255", "steps": 2, "draws": 1}
    kept, calls = tmp_path / "kept.json", []

    def attack(*args, **settings):
        """Counts."""
        calls.append(1)
        return upwards(*args, **settings)

    bench.attacked(model, seen, given, {}, attack, kept)
    assert len(calls) == 2
    monkeypatch.setattr(bench, "defend", lambda model, name, **settings: defend(model, name, sigma=2.0))
    bench.attacked(model, seen, given, {}, attack, kept)
    assert len(calls) == 3, "the same words of the recipe, another defence"
    seen.names = ("one", "two", "three")
    bench.attacked(model, seen, given, {}, attack, kept)
    assert len(calls) == 5


@pytest.mark.parametrize("name", [None, "noise", "low_pass", "ttc", "clipure_cos_closed"])
def test_the_attack_goes_through_the_stages(model, seen, name):
    """BPDA with the mean over draws breaks more than random noise of the same size does, in the ball, also of random defences."""
    defended = model if name is None else defend(model, name)
    text_KD = model.text_bank(seen.names, seen.templates)
    shown = bench.bpda_and_eot(defended, text_KD, seen.shown_nCHW, seen.labels_n, seen.keys_n, eps=16 / 255, steps=5)
    assert float((shown - seen.shown_nCHW).abs().max()) <= 16 / 255 + 1e-6
    noisy = (seen.shown_nCHW + (seen.noisy(1.0) - seen.shown_nCHW).sign() * 16 / 255).clamp(0, 1)

    def loss(images: torch.Tensor) -> float:
        """The margin over the draws of the choice."""
        looks = [margin(defended.logits(encode_in_stages(defended, images, draw), text_KD), seen.labels_n) for draw in seen.draws(5)]
        return float(torch.stack(looks).mean().detach())

    assert loss(shown) > max(loss(noisy), loss(seen.shown_nCHW))


def test_what_needs_no_attack(model, seen):
    """TTC's threshold lets about the asked share of clean images through; AOM's noise is the largest whose anchors stay near."""
    free = {"noise": [0, "4/255"], "quantile": 0.25, "sigma": ["4/255", "64/255"], "samples": 2, "share": 0.5}
    told = bench.ttc_threshold(model, seen, free)
    assert told["gate_rates"][str(told["threshold"])]["0"] == pytest.approx(0.25, abs=0.1)
    near = bench.aom_sigma(model, seen, {**free, "share": 1e6})
    far = bench.aom_sigma(model, seen, {**free, "share": 1e-6})
    assert (near["sigma"], far["sigma"]) == ("64/255", "4/255")
    assert near["anchors"]["64/255"]["median_degrees"] > near["anchors"]["4/255"]["median_degrees"] > 0


def test_the_recipe_names_what_there_is():
    """Every candidate is a defence with settings that exist, six at most; all but the released CLIPure are there."""
    given = yaml.safe_load(bench.RECIPE.read_text())["attacked"]["candidates"]
    assert set(given) == set(DEFENSES) - {"clipure_cos_release"}
    for name, candidates in given.items():
        assert 1 <= len(candidates) <= bench.MOST_CANDIDATES
        assert [DefenseSpec(name, settings).name for settings in candidates]


def test_the_committed_choice_is_the_rule_s_and_the_table_s():
    """``calibration.json`` holds what the rule makes of its own rows; the table of defences measures those settings.

    Beside them stand what was chosen without an attack (TTC's threshold, AOM's sigma) and what is no candidate's (the gate's tower, priors,
    AOM's copies); the released CLIPure is as published.
    """
    recipe, told = yaml.safe_load(bench.RECIPE.read_text()), json.loads(bench.OUT.read_text())["with_attack"]
    assert told["chosen"] == bench.chosen(told["rows"], recipe["attacked"]["clean_loss"])
    beside = {"ttc": {"threshold", "gate_model"}, "aom": {"sigma", "samples"}, "clipure_diff": {"prior"}}
    table = yaml.safe_load((bench.HERE / "configs" / "eval" / "defenses_table.yaml").read_text())["defenses"]
    for name in table.keys() - {"clipure_cos_release"}:
        settings = {key: value for key, value in table[name].get("settings", {}).items() if key not in beside.get(name, ())}
        assert {**settings_of(name), **settings} == {**settings_of(name), **told["chosen"][name]}, name
