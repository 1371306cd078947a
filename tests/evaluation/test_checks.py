"""Laws of the checks: an attack that leaves the ball or lies is found out, and so is a table with a sample too many or too few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from aft.attacks import PGD, Adversarial
from aft.attacks.base import Attack
from aft.evaluation import Cell, Planned, Protocol, evaluate, first
from aft.evaluation.checks import failed, inside


@dataclass(frozen=True, kw_only=True)
class Faulty(Attack):
    """An attack that adds ``shift`` to every pixel without looking and claims that all are broken, or none."""

    eps: float = 0.02
    norm: str = "linf"
    shift: float = 0.0
    claims: bool | None = None
    clamp: bool = True
    name = "faulty"

    def describe(self) -> dict[str, Any]:
        """Nothing that matters."""
        return {"name": self.name, "shift": str(self.shift), "claims": self.claims}

    def search(self, objective, x_BCHW, keys_B):
        """Moves the images and says what it was told to."""
        moved = x_BCHW + self.shift
        claim = None if self.claims is None else torch.full_like(keys_B, self.claims, dtype=torch.bool)
        flat = x_BCHW.new_zeros(len(x_BCHW))
        return Adversarial(moved.clamp(0, 1) if self.clamp else moved, flat, claim, flat, flat == 0)


def card_of(model, data, folder, **faults):
    """The card of a cell with one faulty attack."""
    attack = Faulty(**faults)
    return evaluate(Cell(model, first(data), Protocol("faulty", (Planned("faulty", "ce", attack),), "linf", attack.eps)), folder)


@pytest.mark.parametrize("faults", [
    {"shift": 0.0201}, {"shift": -0.03}, {"shift": float("nan"), "clamp": False}, {"shift": 0.015, "clamp": False},
])  # fmt: skip
def test_leaving_the_ball_or_the_box_is_suspect(model, data, tmp_path, faults):
    """E1, for more than eps either way, NaN, and values above 1; not for the last bit of rounding."""
    assert card_of(model, data, tmp_path / "bad", **faults)["verdict"] == {"status": "suspect", "failed_checks": ["E1"]}
    assert card_of(model, data, tmp_path / "good", shift=0.02 + 1e-7)["verdict"]["failed_checks"] == []


def test_the_ball_of_each_norm():
    """L-inf bounds each value, L2 the length."""
    clean = torch.full((1, 3, 4, 4), 0.5)
    one, all_ = clean.clone(), clean + 0.1
    one[0, 0, 0, 0] += 0.3
    assert not inside(one, clean, "linf", 0.2).item() and inside(one, clean, "l2", 0.301).item()
    assert inside(all_, clean, "linf", 0.1).item() and not inside(all_, clean, "l2", 0.69).item() and inside(all_, clean, "l2", 0.7).item()


def test_a_claim_of_success_is_not_believed(model, data, tmp_path):
    """E2: the images are the clean ones, so the fresh forward counts them right, whatever the attack says."""
    card = card_of(model, data, tmp_path, claims=True)
    assert card["robust_accuracy"] == card["clean_accuracy"] and card["verdict"]["failed_checks"] == ["E2"]
    assert card["metrics"]["judged_otherwise"] == {"faulty": 30}


def test_a_claim_of_survival_is_not_believed(model, data, tmp_path):
    """E2: what a fresh forward gets wrong is broken, though the attack says that it survived. No claim is no disagreement."""
    card = card_of(model, data, tmp_path / "a", shift=0.3, eps=0.3, claims=False)
    broken = round(40 * (card["clean_accuracy"] - card["robust_accuracy"]))
    assert broken > 2 and card["metrics"]["judged_otherwise"] == {"faulty": broken} and card["verdict"]["failed_checks"] == ["E2"]
    silent = card_of(model, data, tmp_path / "b", shift=0.3, eps=0.3)
    assert silent["robust_accuracy"] == card["robust_accuracy"] and silent["verdict"]["failed_checks"] == []


@pytest.fixture
def sound(data):
    """A table in which all is as it should be."""
    n = len(data)
    clean = np.arange(n) % 2 == 0
    right = np.stack([clean & (np.arange(n) < 30), clean & (np.arange(n) < 20)], 1)
    return {"index": data.index_N.numpy().copy(), "clean": clean, "right": right, "inside": clean | True, "agree": right | True}


def test_sound_verdicts_pass(sound, data):
    """And up to two images at the boundary may be judged otherwise."""
    assert failed(sound, data) == []
    sound["agree"][:2, 0] = False
    assert failed(sound, data) == []
    sound["agree"][2, 1] = False
    assert failed(sound, data) == ["E2"]


def test_an_image_that_gets_well_is_found(sound, data):
    """E3: right after an attack though wrong before it, at the first attack as at the second."""
    sound["right"][1, :] = True
    assert failed(sound, data) == ["E3"]
    sound["right"][1, :] = False
    sound["right"][24, 1], sound["right"][24, 0] = True, False
    assert failed(sound, data) == ["E3"]


@pytest.mark.parametrize("fault", ["repeated", "missing", "foreign", "one too many"])
def test_each_sample_is_counted_once(sound, data, fault):
    """E4: as a padding sampler, a lost part or another set would have it."""
    if fault in ("repeated", "foreign"):
        sound["index"][0] = sound["index"][1] if fault == "repeated" else 10**6
    else:
        rows = np.arange(39) if fault == "missing" else np.append(np.arange(40), 0)
        sound = {name: column[rows] for name, column in sound.items()}
    assert failed(sound, data) == ["E4"]


def test_a_real_attack_passes(model, data, tmp_path):
    """PGD of this project, with its verdicts, in both norms."""
    for norm, eps in (("linf", 0.02), ("l2", 0.15)):
        attack = PGD(eps=eps, norm=norm, steps=5, relative_step_size=0.3, keep="best")
        card = evaluate(Cell(model, first(data), Protocol("p", (Planned("p", "ce", attack),), norm, eps)), tmp_path)
        assert card["verdict"]["failed_checks"] == [] and card["robust_accuracy"] < card["clean_accuracy"]
