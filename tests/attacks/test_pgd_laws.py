"""PGD and FGSM against limits that can be computed, their budgets, and the options' meaning."""

import dataclasses
import itertools

import pytest
import torch

from aft.attacks import APGD, FGSM, L1, L2, PGD, ClassificationObjective, Judged, Linf
from aft.errors import ConfigError, InputError

ROWS = torch.arange(12)


class Linear:
    """Loss <w, x> an image, whose maximum over a ball is known."""

    modules = ()

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x, rows):
        return Judged((x * self.weight).flatten(1).sum(1))


@pytest.fixture()
def linear(batch):
    """A linear loss on fp64 images that keep away from 0 and 1."""
    weight = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Linear(weight), 0.25 + 0.5 * batch[0].double(), batch[2]


def test_one_step_on_a_linear_loss_is_exact(linear):
    """L-inf: x + eps sign(w). L2: x + eps w / ||w|| (but for the safety of one part in a million). Step eps, no random start."""
    objective, x, keys = linear
    w = objective.weight
    assert torch.allclose(FGSM(eps=0.1)(objective, x, keys).x_BCHW, x + 0.1 * w.sign(), rtol=0, atol=1e-15)
    l2 = PGD(eps=0.2, norm="l2", relative_step_size=1.0, steps=1, random_start=False)(objective, x, keys).x_BCHW
    assert torch.allclose(l2, x + 0.2 * w / w.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_many_steps_find_the_linear_maximum(linear, norm, momentum):
    """From any random start, steps that add up to more than 2 eps end at the ball's highest point (L2: to 1 %)."""
    objective, x, keys = linear
    result = PGD(eps=0.1, norm=norm, relative_step_size=0.2, steps=30, momentum=momentum, keep="best")(objective, x, keys)
    w = objective.weight
    rise = 0.1 * (w.abs().sum() if norm == "linf" else w.norm())
    reached = (result.loss_B - objective(x, None).loss_n) / rise
    assert (reached <= 1 + 1e-12).all() and (reached > (1 - 1e-12 if norm == "linf" else 0.99)).all()


def test_momentum_carries_on_where_the_gradient_turns(watch):
    """With m = 1 and L-inf, v sums unit gradients: after gradients +, -, - the third step still goes by the sum, unlike plain PGD."""
    signs = [1.0, -0.5, -0.5]
    x, keys = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    for momentum, expected in ((0.0, 0.5 + 0.01 - 0.01 - 0.01), (1.0, 0.5 + 0.01 + 0.0 - 0.01)):
        factors = iter(signs)
        objective = Linear(torch.ones(1, 1, 2, dtype=torch.float64))
        turning = watch(objective, act=lambda judged, rows, factors=factors: Judged(judged.loss_n * next(factors)))
        attack = PGD(eps=0.3, step_size=0.01, steps=3, random_start=False, momentum=momentum)
        assert torch.allclose(attack(turning, x, keys).x_BCHW, torch.tensor(expected, dtype=torch.float64))


def test_zero_gradient_leaves_the_point(batch):
    """Where the loss is flat the image stays at its start, under both norms; no NaN from 0 / 0, with momentum too."""
    images, _, keys = batch
    flat = Linear(torch.zeros(3, 16, 16))
    for norm, threat in (("linf", Linf(eps=0.1)), ("l2", L2(eps=0.1)), ("l1", L1(eps=0.1))):
        for momentum in (0.0, 0.9):
            attack = PGD(eps=0.1, norm=norm, step_size=0.05, steps=3, momentum=momentum)
            start = threat.random_start(images, keys, 0)
            assert torch.allclose(attack(flat, images, keys).x_BCHW, start, rtol=0, atol=1e-6)
            assert torch.equal(dataclasses.replace(attack, random_start=False)(flat, images, keys).x_BCHW, images)


@pytest.mark.parametrize("steps", [1, 3])
def test_forward_budgets(network, batch, objective_of, steps, watch):
    """keep=last: exactly k forwards. keep=best: k + 1 a restart. FGSM: 1."""
    images, labels, keys = batch
    for attack, forwards in [
        (PGD(eps="1/255", step_size="1/255", steps=steps), steps),
        (PGD(eps="1/255", step_size="1/255", steps=steps, keep="best"), steps + 1),
        (PGD(eps="1/255", step_size="1/255", steps=steps, keep="best", restarts=3), 3 * (steps + 1)),
        (FGSM(eps="1/255"), 1),
    ]:
        watched = watch(objective_of(network, labels))
        attack(watched, images, keys)
        assert watched.sizes == [12] * forwards


def test_broken_samples_cost_nothing_more_and_keep_their_verdict(precise, many, objective_of, watch):
    """Dropping broken samples changes no verdict (fp64); they leave their run, and restarts start from unbroken samples only."""
    images, labels, keys = many[0][:60].double(), many[1][:60], many[2][:60]
    attack = PGD(eps="8/255", step_size="2/255", steps=6, restarts=2, keep="best")
    dropping, full = watch(objective_of(precise, labels)), watch(objective_of(precise, labels))
    with_drop = attack(dropping, images, keys)
    without = dataclasses.replace(attack, drop_broken=False)(full, images, keys)
    assert torch.equal(with_drop.broken_B, without.broken_B) and with_drop.broken_B.any() and not with_drop.broken_B.all()
    assert full.sizes == [60] * 14
    unbroken = int((~dataclasses.replace(attack, restarts=1)(objective_of(precise, labels), images, keys).broken_B).sum())
    first_run, restart = dropping.sizes[:7], dropping.sizes[7:]
    assert first_run == sorted(first_run, reverse=True) and first_run[-1] < 60 and restart[0] == unbroken


def test_an_image_broken_at_its_start_costs_one_forward(precise, batch, objective_of, watch):
    """A clean misclassification is noticed in the first forward and dropped."""
    images, labels, keys = batch
    watched = watch(objective_of(precise, (labels + 1) % 6))
    result = PGD(eps=0, step_size=0.1, steps=20, keep="best")(watched, images.double(), keys)
    assert result.broken_B.all() and watched.sizes == [12] and torch.equal(result.x_BCHW, images.double())


def test_a_broken_iterate_wins_over_a_higher_loss(precise, batch, objective_of, watch):
    """keep=best: an iterate that is broken is kept, with its own lower loss, over unbroken ones before and after it."""
    images, labels, keys = batch
    images = images.double()
    said = iter([(5.0, False), (1.0, True), (9.0, False), (7.0, False)])

    def verdict(judged, rows):
        loss, broken = next(said)
        return Judged(judged.loss_n * 0 + judged.loss_n - judged.loss_n.detach() + loss, torch.full_like(judged.broken_n, broken))

    attack = PGD(eps="6/255", step_size="2/255", steps=3, keep="best", drop_broken=False)
    result = attack(watch(objective_of(precise, labels), act=verdict), images, keys)
    second = PGD(eps="6/255", step_size="2/255", steps=1)(objective_of(precise, labels), images, keys).x_BCHW
    assert torch.equal(result.x_BCHW, second) and result.broken_B.all() and (result.loss_B == 1).all() and (result.gain_B == -4).all()


def test_best_never_falls_with_more_steps(precise, batch, objective_of, watch):
    """Without a verdict, the best of 8 steps has at least the loss of the best of 4: the shorter path is its beginning."""
    images, labels, keys = batch
    losses = []
    for steps in (1, 4, 8):
        silent = watch(objective_of(precise, labels), act=lambda judged, rows: Judged(judged.loss_n))
        attack = PGD(eps="6/255", step_size="4/255", steps=steps, keep="best")
        losses.append(attack(silent, images.double(), keys).loss_B)
    assert (losses[1] >= losses[0]).all() and (losses[2] >= losses[1]).all() and (losses[2] > losses[0]).any()


def test_last_is_last_and_gain_is_last_known_minus_first(precise, batch, objective_of):
    """keep=last returns iterate k; loss and gain are of iterates k - 1 and 0, which shorter runs show."""
    images, labels, keys = batch
    objective, images = objective_of(precise, labels), images.double()
    attack = PGD(eps="6/255", step_size="2/255", steps=3)
    result = attack(objective, images, keys)
    iterate_2 = dataclasses.replace(attack, steps=2)(objective, images, keys).x_BCHW
    start = attack.threat.random_start(images, keys, 0)
    assert torch.allclose(result.loss_B, objective(iterate_2, ROWS).loss_n)
    assert torch.allclose(result.gain_B, (objective(iterate_2, ROWS).loss_n - objective(start, ROWS).loss_n))
    assert result.broken_B is None


def test_robust_accuracy_falls_with_eps(classifier, many, objective_of):
    """A larger ball is never safer (half a point of slack), and the ladder is not trivial: from above 90 % to below 10 %."""
    images, labels, keys = many
    ladder = [0, 2, 5, 8, 14]
    broken = [
        PGD(eps=f"{eps}/255", relative_step_size=0.25, steps=8, keep="best")(objective_of(classifier, labels), images, keys).broken_B
        for eps in ladder
    ]
    accuracy = [1 - flags.double().mean().item() for flags in broken]
    assert all(after <= before + 0.005 for before, after in itertools.pairwise(accuracy)), accuracy
    assert accuracy[0] > 0.9 and accuracy[-1] < 0.1


def test_restarts_differ_and_help(precise, many, objective_of, watch):
    """A restart starts elsewhere: three restarts find a loss that one does not, and never a lower one."""
    images, labels, keys = many[0][:12].double(), many[1][:12], many[2][:12]
    objective = watch(objective_of(precise, labels), act=lambda judged, rows: Judged(judged.loss_n))
    attack = PGD(eps="6/255", step_size="6/255", steps=1, keep="best")
    one = attack(objective, images, keys).loss_B
    three = dataclasses.replace(attack, restarts=3)(objective, images, keys).loss_B
    assert (three >= one).all() and (three > one).any()


def test_targeted_and_step_size_in_both_units(precise, batch):
    """A relative step size is a share of eps; a PGD maximises whatever loss it is given, also a targeted one."""
    assert PGD(eps="8/255", relative_step_size=0.25, steps=1).absolute_step_size == pytest.approx(2 / 255)
    images, labels, keys = batch
    aimed = ClassificationObjective(precise, labels, "dlr_targeted", (labels + 1) % 6)
    result = PGD(eps="6/255", step_size="1/255", steps=5, keep="best", drop_broken=False)(aimed, images.double(), keys)
    assert (result.gain_B > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "step_size = None and relative_step_size = None: give exactly one"),
        ({"step_size": 0.1, "relative_step_size": 0.1}, "give exactly one"),
        ({"step_size": "x/255"}, "step_size = 'x/255' is not a number"),
        ({"relative_step_size": -1}, "relative_step_size = -1 is negative"),
        ({"step_size": 0.1, "momentum": -1}, "momentum = -1 is negative"),
        ({"step_size": 0.1, "steps": 0}, "steps = 0 is not a whole number of 1 or more"),
        ({"step_size": 0.1, "steps": 2.0}, "steps = 2.0 is not a whole number"),
        ({"step_size": 0.1, "keep": "first"}, "keep = 'first' is unknown: write last"),
        ({"step_size": 0.1, "restarts": 2}, "restarts = 2 needs keep = best and random_start = true"),
        ({"step_size": 0.1, "restarts": 2, "keep": "best", "random_start": False}, "restarts = 2 needs keep = best"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    """Each setting out of range, or at odds with another, is refused when the attack is made."""
    with pytest.raises(ConfigError, match=message):
        PGD(**{"eps": 0.1, "steps": 1, **settings})


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_given_start_is_moved_into_ball_and_box_first(network, batch, objective_of, watch, norm):
    """The first look is at the nearest point that is allowed; a start that is allowed already is looked at as it is, also by FGSM."""
    images, labels, keys = batch
    attack = PGD(eps={"linf": 8 / 255, "l2": 0.5, "l1": 8}[norm], relative_step_size=0.25, steps=1, norm=norm)
    seen = []

    def objective(x, rows):
        seen.append(x.detach().clone())
        return objective_of(network, labels)(x, rows)

    objective.modules = [network]
    far = images + 2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    inside = attack.threat.project(images + 1e-4, images)
    for given, point in [(far, attack.threat.project(far, images)), (inside, inside)]:
        seen.clear()
        attack(objective, images, keys, given)
        assert torch.equal(seen[0], point)
        FGSM(eps=attack.eps, norm=norm)(objective, images, keys, given)
        assert torch.equal(seen[1], point)


def test_a_start_that_cannot_be_is_named(network, batch, objective_of):
    """For an attack that chooses its own, and of another shape, which would else be spread over the batch."""
    images, labels, keys = batch
    with pytest.raises(ConfigError, match="apgd chooses its own start"):
        APGD(eps="8/255", steps=2)(objective_of(network, labels), images, keys, images)
    with pytest.raises(InputError, match="give a point an image"):
        PGD(eps="8/255", step_size="8/255", steps=1)(objective_of(network, labels), images, keys, images[:1])
