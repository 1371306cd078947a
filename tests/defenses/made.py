"""Every defence with small settings: what the tests of all defences go through."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from aft.clip import ZeroShotModel
from aft.clip.stages import Draw, draws_for
from aft.defenses import DEFENSES, Defended, LatentDiffusionPrior, defend

NAMES, TEMPLATES = ("cat", "dog", "ship"), ("a {}", "the {}.")
SMALL: dict[str, dict[str, Any]] = {
    "aom": {"samples": 2, "gate": 0.01},
    "ttc": {"threshold": 0.05},
    "anti_adversary": {"step_size": "4/255"},
    "clipure_diff": {"steps": 3, "samples": 2, "step": 0.05, "first": 0.2, "last": 0.6},
}
EVERY = sorted(DEFENSES)


def make(name: str, model: ZeroShotModel, folder: Path, **settings: Any) -> Defended:
    """A defence over this model, which knows three classes; a diffusion prior of the model's width is made in the folder."""
    given = {**SMALL.get(name, {}), **settings}
    if name == "clipure_diff" and "prior" not in given:
        given["prior"] = str(folder / "prior.safetensors")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LatentDiffusionPrior(model.width, hidden=8, blocks=1).save(Path(given["prior"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = defend(model, name, **given)
    made.text_bank(NAMES, TEMPLATES)
    return made


def draw_of(keys_n: torch.Tensor, number: int = 0) -> Draw:
    """A draw of the verdict's."""
    return draws_for("scoring", keys_n, first=number)[0]
