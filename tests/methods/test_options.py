"""Options of terms and of text transformations reach the loss: each against float64 numpy, through the method's own step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aft.clip import ModelSpec
from aft.clip.text_transform import TextTransformSpec
from tests.conftest import MemoryData, make_trainer
from tests.methods.recipes import build
from tests.methods.test_formulas import Array, Case, after_attack, case_of, cross_entropy, kl, moved, squared, unit


def margins(text: Array, margin: float, function: str) -> Array:
    """Rivals' margins: of far ones more, of near ones more, or of all the same."""
    far = np.sqrt(np.array([[squared(a, b) for b in text] for a in text]))
    off = ~np.eye(len(text), dtype=bool)
    share = (far - far[off].min()) / (far[off].max() - far[off].min())
    return np.array(margin * {"increasing": share, "decreasing": 1 - share, "constant": np.ones_like(share)}[function] * off)


def tima(
    c: Case, function: str = "decreasing", margin: float = 1.0, power: float = 2.0, last: Callable[[Case], float] | None = None
) -> float:
    """TIMA's loss with these options; ``last`` is its text-aware distillation."""
    tuned, teacher = c.residual(c.names), c.z(c.teacher_clean)
    with_margin = cross_entropy(c.z(c.adversarial, tuned) + margins(c.names, margin, function)[c.y], c.y).mean()
    pairs = [1 / (1 + float(squared(a, b)) ** (power / 2)) for i, a in enumerate(tuned) for j, b in enumerate(tuned) if i != j]
    kept = kl(teacher, c.z(c.teacher_clean, tuned)).mean()
    return float(with_margin + np.mean(pairs) + kept + (kl(teacher, c.z(c.adversarial)).mean() if last is None else last(c)))


def expanded(text: Array, quantile: float) -> Array:
    """Angles to the mean direction stretched so that their quantile comes to 90 degrees, at most to 180."""
    mean = unit(text.mean(0))
    angle = np.arccos(text @ mean)
    across = unit(text - (text @ mean)[:, None] * mean)
    wide = np.minimum(angle * (np.pi / 2) / np.quantile(angle, quantile), np.pi)[:, None]
    return np.array(np.cos(wide) * mean + np.sin(wide) * across)


def laat(c: Case) -> float:
    """With the median angle at 90 degrees."""
    cosine = (unit(c.clean) * unit(c.adversarial)).sum(1)
    return float(cross_entropy(c.z(c.adversarial, expanded(c.names, 0.5)), c.y).mean() - cosine.mean())


def one_term(**settings: Any) -> dict[str, Any]:
    """Settings of one of TIMA's terms."""
    return {"terms": settings}


OPTIONS: dict[str, tuple[str, dict[str, Any], Callable[[Case], float]]] = {
    "margins grow with the distance":
        ("tima", one_term(margin_alignment={"function": "increasing"}), lambda c: tima(c, "increasing")),
    "one margin for all": ("tima", one_term(margin_alignment={"function": "constant", "margin": 2.0}), lambda c: tima(c, "constant", 2.0)),
    "energy of another power": ("tima", one_term(text_energy={"power": 4.0}), lambda c: tima(c, power=4.0)),
    "distillation the other way round": (
        "tima", one_term(text_aware_distillation={"direction": "adversarial_first"}),
        lambda c: tima(c, last=lambda c: float(kl(c.z(c.adversarial), c.z(c.teacher_clean)).mean())),
    ),
    "a sum over the batch": (
        "tima", one_term(text_aware_distillation={"reduction": "sum"}),
        lambda c: tima(c, last=lambda c: float(kl(c.z(c.teacher_clean), c.z(c.adversarial)).sum())),
    ),
    "a quantile of the angles": ("laat", {"text_transform": TextTransformSpec("expansion", quantile=0.5)}, laat),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.filterwarnings("ignore:.*class texts")
def test_an_option_is_in_the_loss(option: str, tiny: ModelSpec, tmp_path: Path) -> None:
    """The whole loss of a batch after the method's own attack. LAAT's map is stored in fp32."""
    name, settings, formula = OPTIONS[option]
    data = MemoryData(dtype=torch.float64)
    method = build(name, tiny, **settings).double()
    method._trainer = make_trainer(tmp_path, precision="64-true")
    method._trainer.datamodule = data  # type: ignore[attr-defined]
    moved(method.model.visual, 0.02)
    moved(method.model.text_transform, 0.1)
    method.setup("fit")
    batch = data.batches()[0]
    batch.captions = ["a"] * len(batch.images)
    targets, views = after_attack(method, batch)
    total = torch.stack([term.weight_at(0) * term(targets, views) for term in method.terms.values()]).sum()
    assert targets.adversarial_BCHW is not None
    case = case_of(method, build("fare", tiny).double().model.eval(), data, batch, targets.adversarial_BCHW)
    assert float(total.detach()) == pytest.approx(formula(case), rel=1e-5 if name == "laat" else 1e-9)
