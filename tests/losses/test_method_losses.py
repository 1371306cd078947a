"""Losses of the methods: float64 references from their formulas, finite differences, limits, and the edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aft.errors import ConfigError
from aft.losses import (
    cosine,
    hyperspherical_energy,
    image_to_caption,
    kl_divergence,
    map_distance,
    rival_margins,
    soft_cross_entropy,
    squared_distance,
    text_guided_attention,
    unit_distance,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    """float64 noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: Tensor) -> list[float]:
    """By hand."""
    powers = [math.exp(float(v)) for v in row]
    return [power / sum(powers) for power in powers]


def test_kl_from_the_formula() -> None:
    """``sum p log(p / q)``, an image at a time; not symmetric, zero for equal distributions."""
    first, second = random(3, 4), random(3, 4, seed=1)
    for i in range(3):
        p, q = softmax(first[i]), softmax(second[i])
        expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert float(kl_divergence(first, second)[i]) == pytest.approx(expected, rel=1e-12)
    assert not torch.allclose(kl_divergence(first, second), kl_divergence(second, first))
    torch.testing.assert_close(kl_divergence(first, first + 3), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)


def test_kl_of_certain_distributions_is_finite() -> None:
    """Where one side is (numerically) one-hot."""
    sure = torch.tensor([[2000.0, 0.0, -2000.0]], requires_grad=True)
    loss = kl_divergence(sure, torch.zeros(1, 3))
    (gradient,) = torch.autograd.grad(loss.sum(), sure)
    assert float(loss.detach()) == pytest.approx(math.log(3)) and torch.isfinite(gradient).all()


def test_soft_cross_entropy_with_one_hot_labels_is_cross_entropy() -> None:
    """And from the formula with soft ones."""
    logits, labels = random(3, 4), torch.tensor([2, 0, 3])
    hot = torch.nn.functional.one_hot(labels, 4).double()
    torch.testing.assert_close(soft_cross_entropy(logits, hot), torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    soft = random(3, 4, seed=2).softmax(1)
    expected = -sum(float(soft[1, k]) * math.log(softmax(logits[1])[k]) for k in range(4))
    assert float(soft_cross_entropy(logits, soft)[1]) == pytest.approx(expected, rel=1e-12)


def test_distances_from_the_formula() -> None:
    """Squared distance sums over the width; cosine and unit distance do not see lengths."""
    a, b = random(3, 5), random(3, 5, seed=1)
    for i in range(3):
        u, v = a[i].tolist(), b[i].tolist()
        dot, size = sum(x * y for x, y in zip(u, v, strict=True)), math.hypot(*u) * math.hypot(*v)
        assert float(squared_distance(a, b)[i]) == pytest.approx(sum((x - y) ** 2 for x, y in zip(u, v, strict=True)), rel=1e-12)
        assert float(cosine(a, 7 * b)[i]) == pytest.approx(dot / size, rel=1e-12)
        assert float(unit_distance(3 * a, b)[i]) == pytest.approx(math.sqrt(2 - 2 * dot / size), rel=1e-9)


@pytest.mark.parametrize(("axis", "with_class"), [("channel", False), ("channel", True), ("token", False), ("token", True)])
def test_attention_from_the_formula(axis: str, with_class: bool) -> None:
    """Nearest-neighbour size (the patch grid itself): inner products over the named norm, scaled to [0, 1]; a class token is in no map."""
    tokens, text = random(2, 9, 4), torch.nn.functional.normalize(random(2, 4, seed=1), dim=1)
    class_token = random(2, 4, seed=2) if with_class else None
    found = text_guided_attention(tokens, text, 3, axis, class_token)  # type: ignore[arg-type]
    for i in range(2):
        if axis == "channel":
            fit = [sum(float(tokens[i, j, d]) * float(text[i, d]) for d in range(4)) / math.hypot(*tokens[i, j].tolist()) for j in range(9)]
        else:
            first = [] if class_token is None else [class_token[i].tolist()]
            size = [math.hypot(*(token[d] for token in [*first, *tokens[i].tolist()])) for d in range(4)]
            fit = [sum(float(tokens[i, j, d]) * float(text[i, d]) / size[d] for d in range(4)) for j in range(9)]
        expected = [(a - min(fit)) / (max(fit) - min(fit)) for a in fit]
        torch.testing.assert_close(found[i], torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_the_norm_of_a_map_grows_with_its_side() -> None:
    """7 x 7 patches drawn at 224: about 32 times the norm."""
    tokens, text = random(1, 49, 8), torch.nn.functional.normalize(random(1, 8, seed=1), dim=1)
    small, large = (map_distance(text_guided_attention(tokens, text, size), torch.zeros(1, size * size)) for size in (7, 224))
    assert 0.8 * 32 < float(large / small) < 32


def test_a_constant_map_is_zero_and_has_a_finite_gradient() -> None:
    """The released min-max gives NaN here (trap 15)."""
    tokens = torch.ones(1, 4, 3, requires_grad=True)
    found = text_guided_attention(tokens, torch.tensor([[1.0, 0.0, 0.0]]), 4)
    (gradient,) = torch.autograd.grad(map_distance(found, torch.rand(1, 16)).sum(), tokens)
    assert not found.any() and torch.isfinite(gradient).all()


def test_tokens_that_are_no_square_and_an_unknown_axis_are_refused() -> None:
    """With the number, and what is allowed."""
    with pytest.raises(ConfigError, match="6 patch tokens"):
        text_guided_attention(random(1, 6, 3), random(1, 3), 4)
    with pytest.raises(ConfigError, match="axis = 'patch'"):
        text_guided_attention(random(1, 4, 3), random(1, 3), 4, "patch")  # type: ignore[arg-type]


def test_energy_of_two_texts_and_as_they_spread() -> None:
    """Orthogonal 1/3, opposite 1/5, equal 1; from the formula; it falls when texts spread; its gradient is finite where texts are equal."""
    x, y = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for other, expected in ((y, 1 / 3), (-x, 1 / 5), (x, 1.0)):
        assert float(hyperspherical_energy(torch.stack([x, other]))) == pytest.approx(expected, rel=1e-12)
    text = torch.nn.functional.normalize(random(5, 4), dim=1)
    pairs = [1 / (1 + math.dist(text[j].tolist(), text[k].tolist()) ** 3) for j in range(5) for k in range(5) if j != k]
    assert float(hyperspherical_energy(text, 3.0)) == pytest.approx(sum(pairs) / 20, rel=1e-10)
    angles = [torch.tensor([[math.cos(a), math.sin(a)], [math.cos(a), -math.sin(a)]]) for a in (0.1, 0.4, 0.7)]
    energies = [float(hyperspherical_energy(t)) for t in angles]
    assert energies == sorted(energies, reverse=True)
    equal = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(hyperspherical_energy(equal), equal)[0]).all()
    with pytest.raises(ConfigError, match="1 class"):
        hyperspherical_energy(text[:1])
    with pytest.raises(ConfigError, match="power = 0.0"):
        hyperspherical_energy(text, 0.0)


def test_margins_by_distance() -> None:
    """Near rivals get more (decreasing), less (increasing), or all the same; the class itself none; equal distances give all the margin."""
    text = torch.tensor([[1.0, 0.0], [math.cos(0.5), math.sin(0.5)], [-1.0, 0.0]], dtype=torch.float64)
    near = rival_margins(text, 2.0, "decreasing")
    assert float(near[0, 1]) == 2.0 and float(near[0, 2]) == 0.0 and 0 < float(near[1, 2]) < 2 and not near.diagonal().any()
    torch.testing.assert_close(near + rival_margins(text, 2.0, "increasing"), rival_margins(text, 2.0, "constant"))
    torch.testing.assert_close(rival_margins(torch.eye(3), 1.5), 1.5 * (1 - torch.eye(3)))
    for settings in ({"margin": -1.0}, {"margin": 1.0, "function": "rising"}):
        with pytest.raises(ConfigError):
            rival_margins(text, **settings)  # type: ignore[arg-type]


def test_image_to_caption_without_any_truth_is_zero() -> None:
    """And the mean over several true captions from the formula."""
    logits = random(2, 3)
    true = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    p = softmax(logits[0])
    torch.testing.assert_close(
        image_to_caption(logits, true), torch.tensor([-(math.log(p[0]) + math.log(p[2])) / 2, 0.0], dtype=torch.float64), rtol=1e-10, atol=0
    )


GRADIENTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "kl": (kl_divergence, (random(3, 4), random(3, 4, seed=1))),
    "soft cross-entropy": (lambda z: soft_cross_entropy(z, random(3, 4, seed=1).softmax(1)), (random(3, 4),)),
    "squared distance": (squared_distance, (random(3, 4), random(3, 4, seed=1))),
    "cosine": (cosine, (random(3, 4), random(3, 4, seed=1))),
    "unit distance": (unit_distance, (random(3, 4), random(3, 4, seed=1))),
    "attention by channel": (lambda v: text_guided_attention(v, random(2, 3, seed=1), 5), (random(2, 4, 3),)),
    "attention by token": (lambda v: text_guided_attention(v, random(2, 3, seed=1), 5, "token"), (random(2, 4, 3),)),
    "map distance": (map_distance, (random(2, 9), random(2, 9, seed=1))),
    "energy": (hyperspherical_energy, (random(4, 3),)),
    "image to caption": (lambda z: image_to_caption(z, torch.eye(3, 4) > 0), (random(3, 4),)),
}


@pytest.mark.parametrize("loss", GRADIENTS)
def test_gradients_agree_with_finite_differences(loss: str) -> None:
    """torch.autograd.gradcheck in float64."""
    function, inputs = GRADIENTS[loss]
    assert torch.autograd.gradcheck(function, tuple(value.requires_grad_(True) for value in inputs))
