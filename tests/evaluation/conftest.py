"""A classifier of a few hundred weights in the place of a CLIP, and a set of which it gets three quarters right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aft.batch import EvaluationSet
from aft.clip.model import ModelRecord, ZeroShotModel

SIDE, WIDTH = 6, 8
NAMES = ("ant", "bee", "cow", "dog", "elk")


class TinyClip(nn.Module):
    """The parts of an open_clip model that ZeroShotModel uses; dropout makes its modes differ."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, WIDTH))
        self.text = nn.Embedding(256, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        self.text_calls = 0

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Mean of letter vectors."""
        self.text_calls += 1
        return self.text(tokens).mean(1)


def letters(texts: list[str]) -> Tensor:
    """Texts as bytes, cut to 24."""
    return torch.tensor([list(text.encode()[:24].ljust(24)) for text in texts])


def make_model(seed: int = 0, **record: object) -> ZeroShotModel:
    """A tiny zero-shot model in eval mode; ``record`` changes its record."""
    facts = {"name": "tiny", "layout": "random", "sha256": f"{seed:x}" * 64, "config": {}, "resolution": SIDE, "mean": (0.5, 0.5, 0.5),
             "std": (0.25, 0.25, 0.25), "activation": "gelu", "logit_scale": 20.0}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ZeroShotModel(TinyClip(seed), letters, ModelRecord(**{**facts, **record})).eval()


def make_data(model: ZeroShotModel, n: int = 40, names: tuple[str, ...] = NAMES, shift: int = 100) -> EvaluationSet:
    """Random images; labels are what the model says of three quarters of them, and the next class for the others."""
    images = torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    templates = ("a {}",)
    with torch.no_grad():
        said = model(images, model.text_bank(names, templates)).argmax(1)
    labels = torch.where(torch.arange(n) % 4 == 3, (said + 1) % len(names), said)
    return EvaluationSet("toy", "test", images, labels, torch.arange(n) * 3 + shift, names, templates)


@pytest.fixture
def model() -> ZeroShotModel:
    """The tiny model."""
    return make_model()


@pytest.fixture
def data(model: ZeroShotModel) -> EvaluationSet:
    """Forty images for it."""
    return make_data(model)


@pytest.fixture(scope="session")
def make() -> tuple[Callable[..., ZeroShotModel], Callable[..., EvaluationSet]]:
    """The makers of models and sets, for tests that need others."""
    return make_model, make_data
