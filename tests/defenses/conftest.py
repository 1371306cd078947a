"""Models that defences are tried on, in float64: a transformer, a ResNet, and one whose texts are transformed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aft.attacks import sample_keys
from aft.clip import ModelSpec, ZeroShotModel, load_model
from aft.clip.model import ZeroShotModel as Model
from aft.clip.text_transform import TextTransformSpec, make_transform
from tests import towers
from tests.defenses.made import NAMES, TEMPLATES

KINDS = ("vit", "resnet", "expanded_texts")


def of_kind(kind: str, patch: pytest.MonkeyPatch, folder: Path) -> ZeroShotModel:
    """A tiny model with random weights that are shaken."""
    torch.manual_seed(0)
    towers.register(patch, folder)
    model = load_model(ModelSpec("resnet" if kind == "resnet" else "vit", "random"))
    towers.shake(model.visual)
    if kind == "expanded_texts":
        transform = make_transform(TextTransformSpec("expansion"), model.width)
        transform.fit(model.text_bank(NAMES, TEMPLATES))
        model = Model(model.clip, model.tokenizer, model.record, transform)
    return model.double().eval()


@pytest.fixture(params=KINDS)
def precise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ZeroShotModel:
    """One of the three, in float64."""
    return of_kind(request.param, monkeypatch, tmp_path)


@pytest.fixture
def vit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ZeroShotModel:
    """The transformer, in float64."""
    return of_kind("vit", monkeypatch, tmp_path)


@pytest.fixture
def images() -> torch.Tensor:
    """Seven images in float64, some pixels at the border of [0, 1]."""
    return torch.rand(7, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).mul_(1.2).sub_(0.1).clamp_(0, 1)


@pytest.fixture
def keys() -> torch.Tensor:
    """Their keys."""
    return sample_keys(0, 0, torch.arange(7))
