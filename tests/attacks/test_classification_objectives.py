"""Losses against their formulas in float64 and finite differences; the objective's checks."""

import pytest
import torch

from aft.attacks import ClassificationObjective, ce, dlr, dlr_targeted, margin
from aft.errors import ConfigError, InputError

LOGITS = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
LABELS, TARGETS = torch.arange(20) % 6, (torch.arange(20) + 2) % 6
X = torch.rand(20, 3, 4, 4)
ROWS = torch.arange(20)
LOSSES = {
    "ce": ce,
    "margin": margin,
    "dlr": dlr,
    "dlr_targeted": lambda logits, labels: dlr_targeted(logits, labels, TARGETS[: len(labels)]),
}


def by_hand(loss: str, z: list[float], y: int, t: int) -> float:
    """The formula on one row of plain numbers."""
    other, ranked = max(value for j, value in enumerate(z) if j != y), sorted(z, reverse=True)
    if loss == "ce":
        return torch.tensor(z, dtype=torch.float64).logsumexp(0).item() - z[y]
    if loss == "margin":
        return other - z[y]
    if loss == "dlr":
        return (other - z[y]) / (ranked[0] - ranked[2])
    return (z[t] - z[y]) / (ranked[0] - 0.5 * ranked[2] - 0.5 * ranked[3])


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_their_formulas(loss):
    """Each row equals the formula on plain numbers to 1e-10."""
    expected = [by_hand(loss, row.tolist(), int(y), int(t)) for row, y, t in zip(LOGITS, LABELS, TARGETS, strict=True)]
    assert torch.allclose(LOSSES[loss](LOGITS, LABELS), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_differences(loss):
    """The gradient is that of the formula, and a row's loss does not feel another row."""
    logits = LOGITS[:4].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: LOSSES[loss](z, LABELS[:4]), logits, atol=1e-6)


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_sign_is_the_verdict(loss):
    """Margin and DLR are positive exactly where the image is misclassified."""
    assert torch.equal(LOSSES[loss](LOGITS, LABELS) > 0, LOGITS.argmax(1) != LABELS)


@pytest.mark.parametrize("loss", ["dlr", "dlr_targeted"])
def test_dlr_ignores_shift_and_scale(loss):
    """CLIP's logit scale cannot mask DLR's gradient: shift and scale of the logits leave the loss as it is; equal logits stay finite."""
    assert torch.allclose(LOSSES[loss](100 * LOGITS - 7, LABELS), LOSSES[loss](LOGITS, LABELS))
    assert LOSSES[loss](torch.zeros(20, 6), LABELS).isfinite().all()


def test_objective_judges_rows():
    """``rows`` picks the labels; broken = argmax != label; lower precision is raised to fp32 before the loss."""
    objective = ClassificationObjective(lambda x: LOGITS[ROWS[: len(x)]].half(), LABELS, "margin")
    rows = torch.tensor([3, 1])
    judged = objective(X[:2], rows)
    assert judged.loss_n.dtype == torch.float32
    assert torch.equal(judged.loss_n, margin(LOGITS[:2].half().float(), LABELS[rows]))
    assert torch.equal(judged.broken_n, LOGITS[:2].argmax(1) != LABELS[rows])


def test_towards_and_wrong_classes():
    """Wrong classes come most likely first and never hold the label; ``towards`` is the targeted DLR of the same classifier."""
    objective = ClassificationObjective(lambda x: LOGITS[: len(x)], LABELS)
    wrong = objective.wrong_classes(X, ROWS, 5)
    assert not (wrong == LABELS[:, None]).any()
    assert (LOGITS.gather(1, wrong).diff(dim=1) <= 0).all()
    assert torch.equal(objective.towards(TARGETS)(X, ROWS).loss_n, dlr_targeted(LOGITS, LABELS, TARGETS))


@pytest.mark.parametrize(("loss", "classes"), [("dlr", 2), ("dlr_targeted", 3), ("ce", 1)])
def test_too_few_classes(loss, classes):
    """A loss that the number of classes does not carry is refused, by the pure function and by the objective."""
    targets = LABELS % classes if loss == "dlr_targeted" else None
    objective = ClassificationObjective(lambda x: LOGITS[:, :classes], LABELS % classes, loss, targets)
    with pytest.raises(InputError, match=f"{loss!r} needs {classes + 1} classes or more, the logits have {classes}"):
        objective(X, ROWS)
    if loss == "dlr":
        with pytest.raises(InputError, match="needs 3 classes"):
            dlr(LOGITS[:, :2], LABELS % 2)
    if loss == "dlr_targeted":
        with pytest.raises(InputError, match="needs 4 classes"):
            dlr_targeted(LOGITS[:, :3], LABELS % 3, LABELS % 3)


def test_too_many_targets():
    """T targets need T + 1 classes; the error says what T may be."""
    objective = ClassificationObjective(lambda x: LOGITS[: len(x)], LABELS)
    with pytest.raises(InputError, match="9 targets need 10 classes or more, the logits have 6: set targets to 5 or fewer"):
        objective.wrong_classes(X, ROWS, 9)


def test_bad_labels_and_settings():
    """Labels outside [0, K), of another type, unknown losses, targets without need: each is named."""

    def logits(x):
        return LOGITS[: len(x)]

    with pytest.raises(InputError, match=r"labels_B holds -1, outside \[0, K\)"):
        ClassificationObjective(logits, LABELS - 1)
    with pytest.raises(InputError, match=r"class 6 is outside \[0, 6\)"):
        ClassificationObjective(logits, LABELS + 1)(X, ROWS)
    with pytest.raises(InputError, match=r"class 7 is outside \[0, 6\)"):
        ClassificationObjective(logits, LABELS, "dlr_targeted", TARGETS + 2)(X, ROWS)
    with pytest.raises(InputError, match="labels_B is torch.float32.*int64"):
        ClassificationObjective(logits, LABELS.float())
    with pytest.raises(InputError, match="one row of K logits an image"):
        ClassificationObjective(lambda x: LOGITS[:3], LABELS)(X, ROWS)
    with pytest.raises(ConfigError, match="unknown loss 'dlrr': did you mean 'dlr'"):
        ClassificationObjective(logits, LABELS, "dlrr")
    with pytest.raises(ConfigError, match="'dlr_targeted' came with none targets_B"):
        ClassificationObjective(logits, LABELS, "dlr_targeted")
    with pytest.raises(ConfigError, match="'ce' came with some targets_B"):
        ClassificationObjective(logits, LABELS, "ce", TARGETS)
