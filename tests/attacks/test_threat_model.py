"""Threat models: ball and box to the last bit, steepest steps, starts, and what eps may be."""

import math

import pytest
import torch

from aft.attacks import L1, L2, PGD, Linf, pixel_fraction, sample_keys, threat_model
from aft.errors import ConfigError

EPS = [0.0, 1e-6, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 0.1, 0.3, 0.7, 1.0]
KEYS = sample_keys(0, 0, torch.arange(8))


def images(dtype=torch.float32) -> torch.Tensor:
    """Images at the edges 0 and 1, next to them, tiny, and in between."""
    random = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    random[0], random[1] = 0, 1
    random[2] = torch.nextafter(random[1], random[0])
    random[3] *= 1e-7
    random[4] = (random[4] * 255).round() / 255
    return random


def far_points(x: torch.Tensor, eps: float) -> list[torch.Tensor]:
    """Points beyond the ball on both sides, on its edge as rounded, and anywhere."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    return [x + 2 * eps, x - 2 * eps, x + eps, x - eps, x + eps * noise.sign(), x + noise]


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linf_projection_is_exact(eps, dtype):
    """|x' - x| <= eps in the images' own arithmetic *and* as real numbers, 0 <= x' <= 1; and no more than two last bits are given away."""
    x = images(dtype)
    for point in [*far_points(x, eps), Linf(eps=eps).random_start(x, KEYS, 0)]:
        projected = Linf(eps=eps).project(point, x)
        assert ((projected - x).abs().double() <= eps).all()
        assert ((projected.double() - x.double()).abs() <= eps).all()
        assert projected.min() >= 0 and projected.max() <= 1
    tight = Linf(eps=eps).project(x + 2, x) - (x + eps).clamp(max=1)
    assert tight.abs().max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("eps", [*EPS, 3.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_projection_stays_inside(eps, dtype):
    """||x' - x|| <= eps in float64 of the stored points, 0 <= x' <= 1, also where the clamp acts after the projection; and it is tight."""
    x = images(dtype)
    for point in [*far_points(x, eps), L2(eps=eps).random_start(x, KEYS, 0)]:
        projected = L2(eps=eps).project(point, x)
        assert torch.linalg.vector_norm((projected.double() - x.double()).flatten(1), dim=1).max() <= eps
        assert projected.min() >= 0 and projected.max() <= 1
    grey = torch.full_like(x, 0.5)
    if 1e-4 < eps <= 10:
        length = torch.linalg.vector_norm((L2(eps=eps).project(grey + 0.4 * (x - 0.5), grey) - grey).double().flatten(1), dim=1)
        assert (length >= 0.999 * torch.linalg.vector_norm(0.4 * (x - 0.5).double().flatten(1), dim=1).clamp(max=eps)).all()


def test_inside_points_stay():
    """A point that is inside ball and box is not moved (L2: but for the rounding of x + (x' - x))."""
    x = images(torch.float64)
    inside = (x + 1e-3 * torch.ones_like(x).sign()).clamp(0, 1)
    assert torch.equal(Linf(eps=2e-3).project(inside, x), inside)
    assert (L2(eps=1).project(inside, x) - inside).abs().max() < 1e-15
    assert torch.equal(L1(eps=1).project(inside, x), inside)


def test_steepest_steps():
    """sign(g); g / ||g|| an image, of length 1 also for gradients whose squares underflow; zero stays zero in both."""
    gradient = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    gradient[1] *= 1e-30
    gradient[2] *= 1e30
    gradient[3] = 0
    assert torch.equal(Linf(eps=1).steepest_step(gradient), gradient.sign())
    step = L2(eps=1).steepest_step(gradient)
    assert torch.allclose(torch.linalg.vector_norm(step.flatten(1), dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert torch.allclose(step[0], gradient[0] / gradient[0].norm())


def test_starts_are_uniform_in_the_ball():
    """L-inf: each coordinate uniform in [-eps, eps]. L2: (r / eps)^d is uniform in [0, 1] and every direction equally likely."""
    grey, keys = torch.full((4000, 1, 1, 3), 0.5, dtype=torch.float64), sample_keys(0, 0, torch.arange(4000))
    cube = (Linf(eps=0.3).random_start(grey, keys, 0) - grey).flatten(1) / 0.3
    ball = (L2(eps=0.3).random_start(grey, keys, 0) - grey).flatten(1) / 0.3
    for unit in ((cube + 1) / 2, torch.linalg.vector_norm(ball, dim=1) ** 3):
        assert abs(unit.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 4000)
        assert abs(unit.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / 4000)
    assert ball.mean(0).abs().max() < 5 * math.sqrt(1 / 5 / 4000)
    assert (ball.T @ ball / 4000 - torch.eye(3) / 5).abs().max() < 0.02


@pytest.mark.parametrize("threat", [Linf(eps=0.1), L2(eps=0.5), L1(eps=5)])
def test_starts_belong_to_key_and_draw(threat):
    """Another key, epoch or draw gives another start; the same key gives the same one in any batch."""
    x = images()
    first = threat.random_start(x, KEYS, 0)
    assert torch.equal(threat.random_start(x[3:5], KEYS[3:5], 0), first[3:5])
    same = x[:1].expand(8, -1, -1, -1)
    starts = [threat.random_start(same, keys, draw) for keys in (KEYS, sample_keys(0, 1, torch.arange(8))) for draw in (0, 1)]
    assert len(torch.cat(starts).unique(dim=0)) == 32


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("linf", 4, r"eps = 4.* is outside \[0, 1\] for L-inf: it is in units of the pixel range, so for 4 grey levels write 4/255\."),
        ("linf", "8", "8 grey levels write 8/255"),
        ("linf", -0.1, "eps = -0.1 is negative"),
        ("l2", "-1/255", "eps = -1/255 is negative"),
        ("linf", "abc", "eps = 'abc' is not a number.*4/255"),
        ("l2", math.nan, "is not a number"),
        ("l2", math.inf, "is not a number"),
        ("linf", "1/0", "is not a number"),
        ("linf", True, "is not a number"),
        ("linf", None, "is not a number"),
        ("l3", 0.1, "unknown norm 'l3'.*Known: l1, l2, linf"),
        ("l1", 0, "eps = 0.0 is no radius for L1: give the positive sum of all pixel changes, such as 12"),
        ("l1", -12, "eps = -12 is negative"),
    ],
)
def test_wrong_eps_is_named(norm, eps, message):
    """The error says what came, what is allowed and what to write, for the threat model and for an attack alike."""
    with pytest.raises(ConfigError, match=message):
        threat_model(norm, eps)
    with pytest.raises(ConfigError, match=message):
        PGD(eps=eps, norm=norm, steps=1, step_size=0.1)


@pytest.mark.parametrize("eps", [1e-6, 0.01, 0.3, 3.0, 12.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l1_projection_is_the_nearest_point(eps, dtype):
    """Of ball and box at once: inside to the last bit, and the point that bisection on the threshold gives in float64."""
    x = images(dtype)
    for point in [*far_points(x, eps), x + 0.01 * (x.flip(0) - 0.5), L1(eps=eps).random_start(x, KEYS, 0)]:
        projected = L1(eps=eps).project(point, x)
        length = (projected.double() - x.double()).abs().flatten(1).sum(1)
        assert length.max() <= eps and projected.min() >= 0 and projected.max() <= 1 and projected.dtype == dtype
        change = (point.double() - x.double()).flatten(1)
        room = torch.where(change > 0, 1 - x.double().flatten(1), x.double().flatten(1))
        low, high = torch.zeros(8, dtype=torch.float64), change.abs().amax(1)
        fits = torch.minimum(change.abs(), room).sum(1) <= eps
        for _ in range(100):
            middle = (low + high) / 2
            beyond = torch.minimum((change.abs() - middle[:, None]).clamp_min(0), room).sum(1) > eps
            low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
        threshold = torch.where(fits, 0.0, high)[:, None]
        nearest = x.double().flatten(1) + change.sign() * torch.minimum((change.abs() - threshold).clamp_min(0), room)
        assert (projected.double().flatten(1) - nearest).abs().max() <= (2**-23 if dtype == torch.float32 else 3e-9)


def test_l1_projection_is_what_a_general_solver_finds():
    """A quadratic programme of six pixels, by scipy; one pixel at the edge, so that the box matters."""
    optimize = pytest.importorskip("scipy.optimize", reason="the general solver")
    x = torch.tensor([[[[0.5, 0.95, 0.1, 0.3, 0.7, 0.0]]]], dtype=torch.float64)
    point = x + torch.tensor([[[[0.4, 0.9, -0.5, 0.05, 0.0, -0.3]]]], dtype=torch.float64)
    start, aim = x.flatten().numpy(), point.flatten().numpy()
    within = {"type": "ineq", "fun": lambda parts: 0.5 - parts.sum()}  # the change in two parts, up and down, each 0 or more
    found = optimize.minimize(
        lambda parts: ((start + parts[:6] - parts[6:] - aim) ** 2).sum(), [0.01] * 12, constraints=[within], method="SLSQP",
        bounds=[*((0, 1 - value) for value in start), *((0, value) for value in start)], options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    expected = start + found.x[:6] - found.x[6:]
    assert found.success and abs(L1(eps=0.5).project(point, x).flatten().numpy() - expected).max() < 1e-5


def test_l1_steps_are_sparse():
    """A hundredth of the entries, one at least, the largest ones, with equal lengths that add up to 1; zero stays zero."""
    gradient = torch.randn(3, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    gradient[1] *= 1e-30
    gradient[2] = 0
    step = L1(eps=1).steepest_step(gradient).flatten(1)
    for image in (0, 1):
        chosen = gradient[image].abs().flatten().topk(3).indices
        assert step[image].nonzero().flatten().tolist() == sorted(chosen.tolist())
        assert torch.allclose(step[image, chosen], gradient[image].flatten()[chosen].sign() / 3)
    assert not step[2].any()
    assert L1(eps=1).steepest_step(gradient[:, :, :2, :2]).flatten(1).count_nonzero(1).tolist() == [1, 1, 0]


def test_l1_starts_are_uniform_in_the_ball():
    """(|v|_1)^d is uniform in [0, 1], the coordinates' variance is 2 / ((d + 1) (d + 2)), and no pair of them goes together."""
    grey, keys = torch.full((4000, 1, 1, 3), 0.5, dtype=torch.float64), sample_keys(0, 0, torch.arange(4000))
    ball = (L1(eps=0.3).random_start(grey, keys, 0) - grey).flatten(1) / 0.3
    unit = ball.abs().sum(1) ** 3
    assert abs(unit.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 4000) and abs(unit.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / 4000)
    assert ball.mean(0).abs().max() < 5 * math.sqrt(0.1 / 4000)
    assert (ball.T @ ball / 4000 - torch.eye(3) / 10).abs().max() < 0.015


def test_l1_eps_is_checked_against_the_image():
    """Beyond the way between opposite corners of the box an L1 radius means nothing."""
    L1(eps=768).check(images())
    with pytest.raises(ConfigError, match=r"eps = 800.0 is outside \[0, 768\] for L1 on 768 pixel values"):
        L1(eps=800).check(images())


def test_l2_eps_is_checked_against_the_image():
    """Beyond the diagonal of the box an L2 radius means nothing, which only the image's size tells."""
    x = images()
    L2(eps=math.sqrt(768)).check(x)
    with pytest.raises(ConfigError, match=r"eps = 128.0 is outside \[0, 27.71\] for L2 on 768 pixel values.*128/255"):
        L2(eps=128).check(x)


def test_pixel_fraction():
    """Numbers and fractions in text are one thing, to the bit; settings hold the number."""
    assert pixel_fraction("4/255") == pixel_fraction(4 / 255) == Linf(eps="4 / 255").eps == 4 / 255
    assert pixel_fraction("0.25") == 0.25 and pixel_fraction(1) == 1.0
    assert Linf(eps="1/2") == Linf(eps=0.5) != L2(eps=0.5)
