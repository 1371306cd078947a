"""Auto-PGD: its schedule, its budget, and that what saves work changes no verdict."""

import dataclasses
import math

import pytest
import torch

from aft.attacks import APGD, PGD, APGDTargeted, FABTargeted, Judged, Square, StockAttack
from aft.attacks.apgd import checkpoints
from aft.errors import ConfigError


@pytest.mark.parametrize("steps", [1, 5, 20, 100])
def test_checkpoints_are_those_of_the_paper(steps):
    """w_j = ceil(p_j N) with p_1 = 0.22 and shrinking gaps of at least 0.06; in whole hundredths, so that no float rounds a ceil up."""
    before, now, expected = 0, 22, [0]
    while now <= 100:
        expected.append(math.ceil(now * steps / 100))
        before, now = now, now + max(now - before - 3, 6)
    found = list(checkpoints(steps))
    assert [at for at, _ in found] == sorted(set(expected) - {0})
    assert [at - window for at, window in found] == [0, *[at for at, _ in found]][:-1]


def test_budgets(network, batch, objective_of, watch):
    """N + 1 forwards a restart; targeted: one for the clean logits and N + 1 for each target and restart."""
    images, labels, keys = batch
    for restarts in (1, 2):
        watched = watch(objective_of(network, labels))
        APGD(eps="1/255", steps=7, restarts=restarts)(watched, images, keys)
        assert len(watched.sizes) == 8 * restarts
        calls = []
        network.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(len(output)))
        APGDTargeted(eps="1/255", steps=4, targets=3, restarts=restarts)(objective_of(network, labels), images, keys)
        assert len(calls) == 1 + 3 * 5 * restarts


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_dropping_broken_samples_changes_no_verdict(precise, many, objective_of, norm, watch):
    """A sample that leaves once broken keeps the verdict of the full run (fp64); it leaves its run and has no restart."""
    images, labels, keys = many[0][:60].double(), many[1][:60], many[2][:60]
    attack = APGD(eps={"linf": "8/255", "l2": 0.7, "l1": 8}[norm], norm=norm, steps=10, restarts=2)
    dropping, full = watch(objective_of(precise, labels)), watch(objective_of(precise, labels))
    with_drop = attack(dropping, images, keys)
    without = dataclasses.replace(attack, drop_broken=False)(full, images, keys)
    assert torch.equal(with_drop.broken_B, without.broken_B) and with_drop.broken_B.any() and not with_drop.broken_B.all()
    assert full.sizes == [60] * 22
    unbroken = int((~dataclasses.replace(attack, restarts=1)(objective_of(precise, labels), images, keys).broken_B).sum())
    first_run, restart = dropping.sizes[:11], dropping.sizes[11:]
    assert first_run == sorted(first_run, reverse=True) and first_run[-1] < 60 and restart[0] == unbroken


def test_step_size_halves_where_the_loss_does_not_rise():
    """On -|x - c|, from a step of 2 eps, the schedule halves its way to the maximum: far nearer than fixed steps of the same size."""
    x, keys = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    centre = torch.tensor([[0.52, 0.47], [0.511, 0.5003]], dtype=torch.float64)

    class Peak:
        modules = ()

        def __call__(self, x, rows):
            return Judged(-(x - centre).abs().flatten(1).sum(1))

    found = APGD(eps=0.1, steps=100)(Peak(), x, keys)
    fixed = PGD(eps=0.1, step_size=0.2, steps=100, keep="best")(Peak(), x, keys)
    assert found.loss_B > -2e-3 and found.loss_B > 0.1 * fixed.loss_B


def test_in_l1_the_walk_follows_how_sparse_its_best_point_is():
    """On a linear loss with three large weights, 100 steps end within 2 % of the highest point of ball and box, which moves those alone."""
    weight = torch.full((48,), 0.01, dtype=torch.float64)
    weight[:3] = 1.0
    x, keys = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    class Linear:
        modules = ()

        def __call__(self, x, rows):
            return Judged((x.flatten(1) * weight).sum(1))

    found = APGD(eps=1.2, norm="l1", steps=100)(Linear(), x, keys)
    assert found.loss_B - (x.flatten() * weight).sum() > 0.98 * 1.2
    assert (found.x_BCHW - x).flatten().abs().sort(descending=True).values[3:].sum() < 0.02 * 1.2


def test_targeted_goes_through_the_wrong_classes_in_turn(network, batch, objective_of, watch):
    """Each target run aims at another wrong class of the clean image, the likeliest first."""
    images, labels, keys = batch
    aims = []

    class Noting(watch):
        def towards(self, targets, loss="dlr_targeted"):
            aims.append(targets)
            return super().towards(targets, loss)

    objective = objective_of(network, labels)
    APGDTargeted(eps="1/255", steps=1, targets=5)(Noting(objective), images, keys)
    assert torch.equal(torch.stack(aims, 1), objective_of(network.eval(), labels).wrong_classes(images, torch.arange(12), 5))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (APGD, {"steps": 0}, "steps = 0 is not a whole number"),
        (APGD, {"restarts": "2"}, "restarts = '2' is not a whole number"),
        (APGDTargeted, {"targets": 0}, "targets = 0 is not a whole number"),
        (APGDTargeted, {"eps": 8}, "eps = 8.* is outside"),
        (APGD, {"eps": 0, "norm": "l1"}, "eps = 0.0 is no radius for L1"),
        (FABTargeted, {"norm": "l1"}, "FAB is here for linf and l2; use PGD and APGD for l1"),
        (Square, {"norm": "l1"}, "the Square attack is here for linf"),
        (StockAttack, {"norm": "l1", "attack": "apgd-ce"}, "use PGD and APGD for l1"),
    ],
)
def test_wrong_settings_are_named(kind, settings, message):
    """Settings out of range are refused when the attack is made."""
    with pytest.raises(ConfigError, match=message):
        kind(**{"eps": 0.1, **settings})
