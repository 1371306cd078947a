"""Every method against its paper's formula, written anew in numpy: the loss of a step, and what its attack maximises.

The networks alone are the project's: embeddings, tokens and texts go into the formulas as plain float64 arrays.
Shapes: B images, K classes, D embedding width, N = h x w patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from aft.batch import Batch
from aft.clip import ModelSpec, ZeroShotModel
from aft.methods import AdversarialFineTuning
from aft.methods.targets import Targets
from aft.methods.views import Views
from tests.conftest import MemoryData, make_trainer
from tests.methods.recipes import RECIPES, build

Array = NDArray[np.float64]
CAPTIONS = ["a cat", "a dog", "a ship at sea", "a cat", "one dog", "ship", "a cat", "dogs"]  # three are equal
ROWS = [5, 2, 7, 0]  # the samples that an attack still asks about


# --- the formulas --------------------------------------------------------------------------------------------------------------


def unit(a: Array) -> Array:
    return a / np.sqrt((a * a).sum(-1, keepdims=True))


def log_p(z: Array) -> Array:
    """log softmax over the last axis."""
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def cross_entropy(z: Array, y: NDArray[np.int64]) -> Array:
    return -np.array([log_p(row)[label] for row, label in zip(z, y, strict=True)])


def kl(p: Array, q: Array) -> Array:
    """KL(P || Q) of logits."""
    return np.array((np.exp(log_p(p)) * (log_p(p) - log_p(q))).sum(-1))


def cos(a: Array, b: Array) -> Array:
    return np.array((unit(a) * unit(b)).sum(-1))


def squared(a: Array, b: Array) -> Array:
    return np.array(((a - b) ** 2).sum(-1))


def enlarge(grid: Array, size: int) -> Array:
    """Bilinear between the centres of patches, constant beyond the outermost centres."""
    h = len(grid)
    weight = np.zeros((size, h))
    for i in range(size):
        at = min(max((i + 0.5) * h / size - 0.5, 0.0), h - 1.0)
        low = min(int(at), h - 2)
        weight[i, low], weight[i, low + 1] = 1 - (at - low), at - low
    return weight @ grid @ weight.T


def attention(tokens: Array, text: Array, size: int = 32) -> Array:
    """Cosine of each patch and its image's text, min-max over patches, enlarged, flattened: ``[B, size * size]``."""
    return drawn(np.einsum("bnd,bd->bn", unit(tokens), text), size)


def attention_over_tokens(tokens: Array, class_token: Array, text: Array, size: int) -> Array:
    """As TGA-ZSR's code has it: N + 1 tokens, each channel divided by its norm over all of them, then the first one dropped."""
    every = np.concatenate([class_token[:, None], tokens], 1)
    normed = every / np.sqrt((every**2).sum(1, keepdims=True))
    return drawn(np.einsum("bnd,bd->bn", normed, text)[:, 1:], size)


def drawn(fit: Array, size: int) -> Array:
    """Scaled to [0, 1] over the patches, and enlarged."""
    low, high = fit.min(1, keepdims=True), fit.max(1, keepdims=True)
    side = math.isqrt(fit.shape[1])
    return np.stack([enlarge(row.reshape(side, side), size).ravel() for row in (fit - low) / (high - low)])


def complement(tokens: Array, text: Array, negation: Array) -> Array:
    return attention(tokens, text) * (1 - attention(tokens, negation))


def expanded(text: Array) -> Array:
    """As LAAT's code does it: rotate the mean to the first axis, stretch the polar angle, rotate back."""
    mean = unit(text.mean(0))
    rotation, _ = np.linalg.qr(np.column_stack([mean, np.eye(len(mean))[:, 1:]]))
    rotation = rotation * np.sign(rotation[:, 0] @ mean)
    turned = text @ rotation
    polar = np.arccos(turned[:, 0])
    wide = polar * (np.pi / 2) / polar.max()
    out = np.column_stack([np.cos(wide), turned[:, 1:] * (np.sin(wide) / np.sin(polar))[:, None]])
    return np.array(out @ rotation.T)


def energy(text: Array) -> float:
    pairs = [1 / (1 + float(squared(a, b))) for i, a in enumerate(text) for j, b in enumerate(text) if i != j]
    return sum(pairs) / len(pairs)


def margins(text: Array, margin: float) -> Array:
    """Near rivals get more: distances scaled to [0, 1] over all pairs, one minus that."""
    far = np.sqrt(np.array([[squared(a, b) for b in text] for a in text]))
    off = ~np.eye(len(text), dtype=bool)
    share = 1 - (far - far[off].min()) / (far[off].max() - far[off].min())
    return np.array(margin * share * off)


def info_nce(z: Array, true: NDArray[np.bool_]) -> float:
    """Mean over what is true of a row, mean over rows; the same for columns; halved."""
    ways = [np.mean([-log_p(row)[t].mean() for row, t in zip(way, truth, strict=True)]) for way, truth in ((z, true), (z.T, true.T))]
    return float(sum(ways) / 2)


@dataclass
class Case:
    """One batch: embeddings of the student (under attack, clean), of the teacher on both, and of texts."""

    scale: float
    y: NDArray[np.int64]
    adversarial: Array
    clean: Array
    teacher_clean: Array
    teacher_adversarial: Array
    tokens: dict[str, Array]
    names: Array  # unit texts of class names, before any transformation
    negations: Array
    residual: Callable[[Array], Array]
    descriptions: Array  # [n, K, D]
    captions: Array
    true: NDArray[np.bool_]

    def z(self, image: Array, text: Array | None = None) -> Array:
        """Logits over class names, or over a text given."""
        return np.array(self.scale * unit(image) @ (self.names if text is None else text).T)


def near_original(c: Case, how: Callable[..., Array], *texts: Array) -> tuple[float, float]:
    """Mean distances of the maps under attack, and on clean images, from the original's."""
    there = how(c.tokens["teacher"], *texts)
    return tuple(float(np.sqrt(squared(how(c.tokens[which], *texts), there)).mean()) for which in ("adversarial", "clean"))  # type: ignore[return-value]


class Formula(NamedTuple):
    """The paper's loss of a batch, and what its attack maximises, of embeddings ``p`` of the samples ``r``."""

    loss: Callable[[Case], float]
    objective: Callable[[Case, Array, list[int]], Array]
    settings: dict[str, Any] = {}


def alignment(c: Case, text: Array | None = None) -> float:
    return float(cross_entropy(c.z(c.adversarial, text), c.y).mean())


def tga(c: Case) -> float:
    adversarial, clean = near_original(c, attention, c.names[c.y])
    return alignment(c) + 0.08 * adversarial + 0.05 * clean


def released_tga(c: Case) -> float:
    """Maps of 48 pixels."""
    there, *others = (attention_over_tokens(c.tokens[which], embedding, c.names[c.y], 48) for which, embedding in
                      (("teacher", c.teacher_clean), ("adversarial", c.adversarial), ("clean", c.clean)))  # fmt: skip
    far = [float(np.sqrt(squared(one, there)).mean()) for one in others]
    return alignment(c) + 0.08 * far[0] + 0.05 * far[1]


def comp_tga(c: Case) -> float:
    adversarial, clean = near_original(c, complement, c.names[c.y], c.negations[c.y])
    return alignment(c) + 0.10 * adversarial + 0.07 * clean


def tima(c: Case) -> float:
    tuned, teacher = c.residual(c.names), c.z(c.teacher_clean)
    with_margin = cross_entropy(c.z(c.adversarial, tuned) + margins(c.names, 1.0)[c.y], c.y).mean()
    return float(with_margin + energy(tuned) + kl(teacher, c.z(c.teacher_clean, tuned)).mean() + kl(teacher, c.z(c.adversarial)).mean())


def advflyp(c: Case) -> float:
    near = [np.sqrt(squared(unit(c.adversarial), unit(other))).mean() for other in (c.teacher_adversarial, c.clean)]
    z, *others = (c.z(image, c.captions) for image in (c.adversarial, c.teacher_adversarial, c.clean))
    return float(info_nce(z, c.true) + sum(near) + sum(kl(z, other).mean() for other in others))


def soft_labels(c: Case) -> Array:
    return np.exp(log_p(0.4 * c.z(c.teacher_clean)))


def mean_over_descriptions(c: Case, image: Array, y: NDArray[np.int64]) -> Array:
    return np.mean([cross_entropy(c.z(image, text), y) for text in c.descriptions], axis=0)


def on_names(c: Case, p: Array, r: list[int]) -> Array:
    return cross_entropy(c.z(p), c.y[r])


def fare(c: Case) -> float:
    return float(squared(c.adversarial, c.teacher_clean).mean())


def from_teacher(c: Case, p: Array, r: list[int]) -> Array:
    return squared(p, c.teacher_clean[r])


FORMULAS: dict[str, Formula] = {
    "tecoa": Formula(alignment, on_names),
    "pmg_aft": Formula(
        lambda c: alignment(c) + float(sum(kl(c.z(c.adversarial), c.z(o)).mean() for o in (c.teacher_adversarial, c.clean))), on_names
    ),
    "pmg_aft_released": Formula(
        lambda c: alignment(c) + float(sum(kl(c.z(o), c.z(c.adversarial)).sum() for o in (c.teacher_adversarial, c.clean))), on_names
    ),
    "tga_zsr": Formula(tga, on_names),
    "tga_zsr_released": Formula(released_tga, on_names),
    "comp_tga": Formula(comp_tga, on_names),
    "laat": Formula(
        lambda c: alignment(c, expanded(c.names)) - float(cos(c.clean, c.adversarial).mean()),
        lambda c, p, r: cross_entropy(c.z(p, expanded(c.names)), c.y[r]),
    ),
    "tima": Formula(tima, lambda c, p, r: cross_entropy(c.z(p, c.residual(c.names)) + margins(c.names, 1.0)[c.y[r]], c.y[r])),
    "fare": Formula(fare, from_teacher),
    "sim_clip": Formula(lambda c: -float(cos(c.adversarial, c.clean).mean()), lambda c, p, r: squared(p, c.clean[r])),
    "sim_clip_released": Formula(lambda c: -float(cos(c.adversarial, c.teacher_clean).mean()) / 2, from_teacher),
    "lore": Formula(fare, from_teacher),  # m c - m c: the constraint has a gradient and no value, tested in test_methods.py
    "lore_scalar": Formula(fare, from_teacher),
    "agft": Formula(
        lambda c: float(-(soft_labels(c) * log_p(c.z(c.adversarial))).sum(1).mean()),
        lambda c, p, r: -(soft_labels(c)[r] * log_p(c.z(p))).sum(1),
        {"logit_scale": 36.0},
    ),
    "advflyp": Formula(
        advflyp,
        lambda c, p, r: np.array([-log_p(row)[t].mean() for row, t in zip(c.z(p, c.captions), c.true[r], strict=True)]),
    ),
    "saft": Formula(
        lambda c: float(mean_over_descriptions(c, c.adversarial, c.y).mean()), lambda c, p, r: mean_over_descriptions(c, p, c.y[r])
    ),
    "trades": Formula(
        lambda c: float((cross_entropy(c.z(c.clean), c.y) + 6.0 * kl(c.z(c.clean), c.z(c.adversarial))).mean()),
        lambda c, p, r: kl(c.z(c.clean)[r], c.z(p)),
    ),
}


# --- the method ----------------------------------------------------------------------------------------------------------------


def moved(model: torch.nn.Module, size: float) -> None:
    """A student that has left its teacher."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=noise, dtype=torch.float64))


def ready(name: str, tiny: ModelSpec, data: MemoryData, folder: Path) -> AdversarialFineTuning:
    """The method in float64, set up, away from its start."""
    method = build(name, tiny, **FORMULAS[name].settings).double()
    method._trainer = make_trainer(folder, precision="64-true")
    method._trainer.datamodule = data  # type: ignore[attr-defined]
    moved(method.model.visual, 0.02)
    moved(method.model.text_transform, 0.1)
    method.setup("fit")
    return method


def after_attack(method: AdversarialFineTuning, batch: Batch) -> tuple[Targets, Views]:
    """One batch after the method's own attack."""
    targets = method.targets(batch)
    adversarial = method.perturb(targets)
    assert adversarial is not None
    targets.adversarial_BCHW = adversarial.x_BCHW
    views = method.views(targets)
    views.open(batch.images, adversarial.x_BCHW)
    return targets, views


def residual_of(method: AdversarialFineTuning) -> Callable[[Array], Array]:
    """``unit(t + B gelu(A t))`` in numpy."""
    state = {key: value.numpy() for key, value in method.model.text_transform.state_dict().items()}

    def apply(text: Array) -> Array:
        inner = text @ state["down.weight"].T + state["down.bias"]
        gelu = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
        return unit(text + gelu @ state["up.weight"].T + state["up.bias"])

    return apply


@torch.no_grad()
def case_of(method: AdversarialFineTuning, teacher: ZeroShotModel, data: MemoryData, batch: Batch, adversarial: Tensor) -> Case:
    """Everything that a formula may ask for, from the networks alone."""
    student, images = method.model, batch.images
    assert batch.labels is not None and batch.captions is not None
    seen = {
        name: model.encode(x, tokens=True)
        for name, model, x in (("adversarial", student, adversarial), ("clean", student, images), ("teacher", teacher, images))
    }
    tokens = {name: encoding.tokens_BND.numpy() for name, encoding in seen.items() if encoding.tokens_BND is not None}

    def texts(phrases: list[str], template: str) -> Array:
        return unit(student.clip.encode_text(student.tokenizer([template.format(p) for p in phrases])).numpy())  # type: ignore[operator]

    names = list(data.class_lists["train"])
    phrased = [[of_class[j % 2] for of_class in data.class_phrases] for j in range(5)]  # the third is true of all classes
    return Case(
        scale=method.logit_scale or float(student.logit_scale), y=batch.labels.numpy(),
        adversarial=seen["adversarial"].embedding_BD.numpy(), clean=seen["clean"].embedding_BD.numpy(),
        teacher_clean=seen["teacher"].embedding_BD.numpy(), teacher_adversarial=teacher.encode(adversarial).embedding_BD.numpy(),
        tokens=tokens, names=texts(names, data.templates[0]), negations=texts(names, "This is not a photo of a {}"),
        residual=residual_of(method), descriptions=np.stack([texts(of_all, data.templates[0]) for of_all in phrased]),
        captions=texts(CAPTIONS, "{}"), true=np.array([[a == b for b in CAPTIONS] for a in CAPTIONS]),
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_loss_and_objective_are_the_papers(name: str, tiny: ModelSpec, tmp_path: Path) -> None:
    """In float64; the objective at random points of the ball, for some samples in another order. LAAT's map is stored in fp32."""
    data = MemoryData(dtype=torch.float64)
    method = ready(name, tiny, data, tmp_path)
    batch = data.batches()[0]
    batch.captions = CAPTIONS
    targets, views = after_attack(method, batch)
    total = sum(term.weight_at(0) * term(targets, views) for term in method.terms.values())
    assert isinstance(total, Tensor) and targets.adversarial_BCHW is not None
    teacher = build("fare", tiny).double().model.eval()
    case, formula = case_of(method, teacher, data, batch, targets.adversarial_BCHW), FORMULAS[name]
    exact = 1e-5 if name == "laat" else 1e-9
    assert float(total.detach()) == pytest.approx(formula.loss(case), rel=exact)
    noise = torch.rand(batch.images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = (batch.images + (2 * noise - 1) * 8 / 255).clamp(0, 1)[ROWS]
    with torch.no_grad():
        judged = method.objective(targets)(points, torch.tensor(ROWS)).loss_n
        expected = formula.objective(case, method.model.encode(points).embedding_BD.numpy(), ROWS)
    np.testing.assert_allclose(judged.numpy(), expected, rtol=exact)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith(("lore", "sim_clip"))])
def test_the_gradient_is_that_of_the_loss(name: str, tiny: ModelSpec, tmp_path: Path) -> None:
    """Central differences in a random direction of all that learns, targets and adversarial images held; nothing is detached by mistake.

    LORE and Sim-CLIP stop gradients on purpose: their tests are in test_methods.py."""
    data = MemoryData(dtype=torch.float64)
    method = ready(name, tiny, data, tmp_path)
    batch = data.batches()[0]
    batch.captions = CAPTIONS
    targets, _ = after_attack(method, batch)
    learned = [p for _, p in method.optimised()]
    noise = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=noise, dtype=torch.float64) for p in learned]

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(learned, direction, strict=True):
                p.add_(step * d)
        views = method.views(targets)
        views.open(batch.images, targets.adversarial_BCHW)
        return torch.stack([term.weight_at(0) * term(targets, views) for term in method.terms.values()]).sum()

    gradients = torch.autograd.grad(loss(0.0), learned, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
    above, below = float(loss(1e-6).detach()), float(loss(-2e-6).detach())
    assert slope == pytest.approx((above - below) / 2e-6, rel=1e-4) and abs(slope) > 1e-6
