"""Our attacks beside those of other packages, on the trained classifier: as strong, within one standard error and never a point weaker.

Foreign attacks read the global random generator, so they run inside ``fork_rng``.
"""

import pytest
import torch

from aft.attacks import APGD, PGD, APGDTargeted, FABTargeted, Square, StockAttack

EPS = {"linf": 6 / 255, "l2": 0.6, "l1": 6.0}


def compare(classifier, ours, foreign_images, many, record_property):
    """Robust accuracies of both, on verdicts of a fresh forward of the images."""
    images, labels, _ = many
    robust = [(classifier(x).argmax(1) == labels).double().mean().item() for x in (ours, foreign_images)]
    error = (robust[1] * (1 - robust[1]) / len(images)) ** 0.5
    for name, figure in zip(("ours", "theirs", "standard_error"), (*robust, error), strict=True):
        record_property(name, round(figure, 4))
    print(f"robust accuracy: ours {robust[0]:.4f}, theirs {robust[1]:.4f}, standard error {error:.4f}, n = {len(images)}")
    assert 0.1 < robust[1] < 0.9, "the comparison is trivial"
    assert abs(robust[0] - robust[1]) <= error
    assert robust[0] <= robust[1] + 0.01


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_is_as_strong_as_autoattacks(classifier, many, objective_of, record_property, norm, loss):
    """APGD-CE and APGD-DLR, 20 steps, against pyautoattack's at the same budget."""
    base = pytest.importorskip("pyautoattack.autopgd_base", reason="the reference for APGD")
    images, labels, keys = many
    ours = APGD(eps=EPS[norm], norm=norm, steps=20)(objective_of(classifier, labels, loss), images, keys).x_BCHW
    with torch.random.fork_rng():
        reference = base.APGDAttack(classifier, n_iter=20, norm=norm.capitalize(), eps=EPS[norm], loss=loss, device="cpu")
        theirs = reference.perturb(images, labels)
    compare(classifier, ours, theirs, many, record_property)


def test_targeted_apgd_is_as_strong_as_autoattacks(classifier, many, objective_of, record_property):
    """APGD-T, 3 targets of 8 steps, against pyautoattack's at the same budget."""
    base = pytest.importorskip("pyautoattack.autopgd_base", reason="the reference for APGD-T")
    images, labels, keys = many
    attack = APGDTargeted(eps=EPS["linf"], steps=8, targets=3)
    ours = attack(objective_of(classifier, labels), images, keys).x_BCHW
    with torch.random.fork_rng():
        reference = base.APGDAttack_targeted(classifier, n_iter=8, norm="Linf", eps=EPS["linf"], n_target_classes=3, device="cpu")
        theirs = reference.perturb(images, labels)
    compare(classifier, ours, theirs, many, record_property)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_fab_is_as_strong_as_autoattacks(classifier, many, objective_of, record_property, norm):
    """FAB-T, 2 targets of 20 steps, against pyautoattack's at the same budget."""
    reference = pytest.importorskip("pyautoattack.fab_pt", reason="the reference for FAB-T")
    images, labels, keys = (part[:150] for part in many)
    ours = FABTargeted(eps=EPS[norm], norm=norm, steps=20, targets=2)(objective_of(classifier, labels), images, keys).x_BCHW
    with torch.random.fork_rng():
        theirs = reference.FABAttack_PT(
            classifier, n_restarts=1, n_iter=20, eps=EPS[norm], seed=0, norm=norm.capitalize(), targeted=True, device="cpu"
        )
        theirs.n_target_classes = 2
        found = theirs.perturb(images, labels)
    compare(classifier, ours, found, (images, labels, keys), record_property)


def test_square_is_as_strong_as_autoattacks(classifier, many, objective_of, record_property):
    """Square, 300 windows at 16/255, against pyautoattack's with as many queries."""
    reference = pytest.importorskip("pyautoattack.square", reason="the reference for Square")
    images, labels, keys = many
    ours = Square(eps=16 / 255, steps=300)(objective_of(classifier, labels, "margin"), images, keys).x_BCHW
    with torch.random.fork_rng():
        theirs = reference.SquareAttack(
            classifier, p_init=0.8, n_queries=300, eps=16 / 255, norm="Linf", n_restarts=1, seed=0, device="cpu", resc_schedule=True
        ).perturb(images, labels)
    compare(classifier, ours, theirs, many, record_property)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stock_attacks_are_autoattacks(classifier, many, objective_of, norm):
    """One attack after the other on what is left, ours through the contract, theirs by their own loop: the same verdict on every image."""
    stock = pytest.importorskip("pyautoattack.autoattack", reason="the package under test")
    images, labels, keys = (part[:24] for part in many)
    names = ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
    with torch.random.fork_rng():
        theirs = stock.AutoAttack(classifier, attacks=names, eps=EPS[norm], norm=norm.capitalize(), seed=0, version="custom")
        theirs.verbose = False
        theirs.apgd.n_iter = theirs.apgd_targeted.n_iter = theirs.fab.n_iter = 10
        theirs.apgd.n_restarts, theirs.square.n_queries = 1, 50
        theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 3
        found, _ = theirs.run_standard_evaluation(images, labels, batch_size=24)
    state = torch.random.get_rng_state()
    right = classifier(images).argmax(1) == labels
    for name in names:
        attack = StockAttack(eps=EPS[norm], attack=name, norm=norm, steps=50 if name == "square" else 10, targets=3)
        rows = right.nonzero().flatten()
        ours = attack(objective_of(classifier, labels[rows]), images[rows], keys[rows])
        assert torch.equal(ours.broken_B, classifier(ours.x_BCHW).argmax(1) != labels[rows])
        right[rows] &= ~ours.broken_B
    assert torch.equal(right, classifier(found).argmax(1) == labels) and 3 < int(right.sum()) < 21
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_pgd_is_as_strong_as_foolboxs(classifier, many, objective_of, record_property, norm):
    """PGD, 10 steps of eps / 4 from a random start, last iterate, against foolbox's LinfPGD, L2PGD and SparseL1Descent (SLIDE)."""
    foolbox = pytest.importorskip("foolbox", reason="an outside PGD, of the extra test, is not installed")
    images, labels, keys = many
    ours = PGD(eps=EPS[norm], norm=norm, relative_step_size=0.25, steps=10)(objective_of(classifier, labels), images, keys).x_BCHW
    kinds = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD, "l1": foolbox.attacks.SparseL1DescentAttack}
    reference = kinds[norm](rel_stepsize=0.25, steps=10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = reference(foolbox.PyTorchModel(classifier, bounds=(0, 1), device="cpu"), images, labels, epsilons=EPS[norm])[1]
    compare(classifier, ours, theirs, many, record_property)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_is_torchattacks_pgd(classifier, many, objective_of, record_property, norm):
    """Without a random start (torchattacks draws L2 starts nearer the centre) both walk one path: at most 0.5 % of verdicts differ."""
    torchattacks = pytest.importorskip("torchattacks", reason="an outside PGD, not installed here: pip install torchattacks")
    images, labels, keys = many
    attack = PGD(eps=EPS[norm], norm=norm, relative_step_size=0.25, steps=10, random_start=False)
    ours = attack(objective_of(classifier, labels), images, keys).x_BCHW
    kind = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    with torch.random.fork_rng():
        theirs = kind(classifier, eps=EPS[norm], alpha=EPS[norm] / 4, steps=10, random_start=False)(images, labels)
    compare(classifier, ours, theirs, many, record_property)
    differ = (classifier(ours).argmax(1) != classifier(theirs).argmax(1)).sum().item()
    print(f"{differ} of {len(images)} predictions differ; largest pixel difference {(ours - theirs).abs().max():.2e}")
    assert differ <= 0.005 * len(images)
