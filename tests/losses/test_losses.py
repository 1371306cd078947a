"""Losses against their formulas in float64, finite differences and limits."""

import math

import pytest
import torch

from aft.losses import alignment, caption_contrast


def test_alignment_is_minus_the_log_of_the_right_softmax() -> None:
    """From the formula, one image at a time."""
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    expected = -sum(math.log(math.exp(logits[i, y]) / sum(math.exp(v) for v in logits[i])) for i, y in enumerate(labels.tolist())) / 5
    assert float(alignment(logits, labels)) == pytest.approx(expected, rel=1e-12)


def test_contrast_with_the_identity_is_clips_loss() -> None:
    """Both directions of cross-entropy to the diagonal, halved."""
    logits = torch.randn(6, 6, dtype=torch.float64)
    diagonal = torch.arange(6)
    expected = (alignment(logits, diagonal) + alignment(logits.T, diagonal)) / 2
    torch.testing.assert_close(caption_contrast(logits, torch.eye(6, dtype=torch.bool)), expected, rtol=1e-12, atol=0)


def test_contrast_with_several_truths_from_the_formula() -> None:
    """Mean over true captions of an image, mean over images that have one; images without any do not count."""
    logits = torch.randn(3, 4, dtype=torch.float64)
    true = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)

    def one_way(z: torch.Tensor, t: torch.Tensor) -> float:
        rows = [-z[i].log_softmax(0)[t[i]].mean() for i in range(len(z)) if t[i].any()]
        return float(sum(rows) / len(rows))

    assert float(caption_contrast(logits, true)) == pytest.approx((one_way(logits, true) + one_way(logits.T, true.T)) / 2, rel=1e-12)


def test_contrast_is_finite_when_nothing_is_true() -> None:
    """No truth at all: zero loss, zero gradient, no NaN."""
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    loss = caption_contrast(logits, torch.zeros(3, 2, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0 and not gradient.any()


@pytest.mark.parametrize("loss", ["alignment", "contrast"])
def test_gradients_agree_with_finite_differences(loss: str) -> None:
    """torch.autograd.gradcheck in float64."""
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    true = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    function = (lambda z: alignment(z, torch.tensor([0, 1, 2, 0]))) if loss == "alignment" else (lambda z: caption_contrast(z, true))
    assert torch.autograd.gradcheck(function, (logits,))


def test_limits() -> None:
    """A perfect answer costs nothing, an even one the log of the number of classes."""
    assert float(alignment(torch.eye(4) * 1e4, torch.arange(4))) == 0.0
    assert float(alignment(torch.zeros(2, 7), torch.tensor([0, 6]))) == pytest.approx(math.log(7))
    perfect = 2 * torch.eye(1000)[:1] - 1  # the best cosines at scale 1: LAAT's docstring says what is left
    assert float(alignment(perfect, torch.tensor([0]))) == pytest.approx(math.log(1 + 999 * math.exp(-2)), rel=1e-5)
    assert float(caption_contrast(torch.zeros(5, 5), torch.eye(5, dtype=torch.bool))) == pytest.approx(math.log(5))
