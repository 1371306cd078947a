"""CLIPure-Cos: what the released iteration does, the two forms that can be trusted, and the lemma that says what they can do at most."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from aft.clip.stages import encode_in_stages
from aft.defenses import defend
from aft.defenses.clipure import IMAGENET_TEMPLATES, iterated, released, slerp
from aft.errors import ConfigError
from tests.defenses.made import NAMES, TEMPLATES, make

T = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
Z = torch.tensor([[0.25, 0.968246, 0.0]], dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random unit vectors in float64."""
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def at_angles(degrees: list[float], width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A target, and unit vectors at these angles to it."""
    target = torch.zeros(width, dtype=torch.float64)
    target[0] = 1
    theta = torch.tensor(degrees, dtype=torch.float64).deg2rad()[:, None]
    side = F.pad(unit(len(degrees), width - 1, seed=seed), (1, 0))
    return theta.cos() * target + theta.sin() * side, target


def test_the_published_iteration_returns_its_input_alone_and_after_even_steps():
    """Below 88.09 degrees; an odd count lands beyond the template; at 89 degrees it does not come back."""
    for degrees in (20.0, 76.0, 88.0):
        z, target = at_angles([degrees])
        torch.testing.assert_close(released(z, target, 30, 10), z, rtol=0, atol=1e-5)
    torch.testing.assert_close(released(Z, T, 30, 1), torch.tensor([[0.976037, -0.217604, 0.0]]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(released(Z, T, 30, 2), F.normalize(Z), rtol=0, atol=1e-6)
    torch.testing.assert_close(released(Z.expand(2, 3), T, 30, 10), F.normalize(Z).expand(2, 3), rtol=0, atol=1e-5)
    z, target = at_angles([76.0])
    odd = math.degrees(math.acos(float(released(z, target, 30, 11) @ target)))
    assert odd == pytest.approx(math.degrees(math.atan(30)) - 76, abs=1e-6)
    z, target = at_angles([89.0])
    assert not torch.allclose(released(z, target, 30, 10), z, atol=1e-2)


def test_its_gradient_is_901_to_the_minus_5():
    """Alone, in float64: ten steps that each divide by sqrt(901). With the inner gradient kept the map is the identity on the sphere."""
    z, target = at_angles([76.0])

    def jacobian(detached: bool) -> torch.Tensor:
        """Singular values of the normalised map at a unit vector."""
        def on_the_sphere(x: torch.Tensor) -> torch.Tensor:
            return F.normalize(released(x[None], target, 30, 10, detached)[0], dim=0)
        return torch.linalg.svdvals(torch.autograd.functional.jacobian(on_the_sphere, z[0]))  # fmt: skip

    assert float(jacobian(True)[0]) == pytest.approx(901.0**-5, rel=1e-6)
    assert jacobian(False)[:-1] == pytest.approx(torch.ones(7).double(), abs=1e-6)


def test_it_leaks_over_the_batch_and_ours_do_not():
    """The first row beside a neighbour at another angle."""
    (near, target), (far, _) = at_angles([76.0, 75.0]), at_angles([76.0, 60.0])
    assert torch.equal(near[0], far[0])
    assert (released(near, target, 30, 10)[0] - released(far, target, 30, 10)[0]).abs().max() > 1e-4
    for form in (lambda z: iterated(z, target, 0.05, 10, 0.9), lambda z: slerp(z, target, 0.5, 0.9)):
        torch.testing.assert_close(form(near)[0], form(far)[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("step, steps", [(0.05, 10), (0.02, 10), (0.1, 5), (0.1, 40)])
def test_the_iteration_is_one_rotation(step, steps):
    """To 1e-12, also where the cap of nine tenths of the angle ends it early."""
    z, target = unit(50, 16), unit(16, seed=1)
    torch.testing.assert_close(iterated(z, target, step, steps, 0.9), slerp(z, target, steps * math.atan(step), 0.9), rtol=0, atol=1e-12)


def test_the_rotation_by_hand():
    """The example of 30 degrees, and that nothing passes nine tenths of the way."""
    expected = torch.tensor([[0.700629, 0.713525, 0.0]]).double()
    torch.testing.assert_close(slerp(F.normalize(Z), T, math.radians(30), 0.9), expected, rtol=0, atol=1e-6)
    z, target = at_angles([40.0, 76.0])
    left = (slerp(z, target, math.pi, 0.9) @ target).acos().rad2deg()
    torch.testing.assert_close(left, torch.tensor([4.0, 7.6]).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [lambda z, t: slerp(z, t, 0.5, 0.9), lambda z, t: iterated(z, t, 0.05, 10, 0.9)])
def test_where_there_is_no_way_the_embedding_stays(form):
    """At the template itself and opposite to it; its gradient is finite."""
    target = unit(16)
    z = torch.stack([target, -target]).requires_grad_(True)
    moved = form(z, target)
    assert torch.equal(moved, z) and torch.autograd.grad(moved.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("form", [lambda z, t: slerp(z, t, 0.5, 0.9), lambda z, t: iterated(z, t, 0.05, 10, 0.9)])
def test_their_derivative_is_exact(form):
    """Finite differences, by the embedding and by the template."""
    z, target = unit(3, 6).requires_grad_(True), unit(6, seed=2).requires_grad_(True)
    assert torch.autograd.gradcheck(form, (z, target))


@pytest.mark.parametrize("degrees", [10.0, 28.62, 60.0])
def test_lemma_any_rotation_towards_the_template_is_a_class_bias(degrees):
    """``argmax_k c_k.z' = argmax_k [c_k.z + b c_k.t]`` with ``b = sin(phi) / sin(theta - phi)``: nothing else can change the answer."""
    z, target, classes = unit(400, 12), unit(12, seed=1), unit(9, 12, seed=2)
    theta = (z @ target).acos()
    phi = (0.9 * theta).clamp(max=math.radians(degrees))
    bias = phi.sin() / (theta - phi).sin()
    moved = slerp(z, target, math.radians(degrees), 0.9)
    expected = (z @ classes.T + bias[:, None] * (classes @ target)).argmax(1)
    assert torch.equal((moved @ classes.T).argmax(1), expected)
    assert not torch.equal(expected, (z @ classes.T).argmax(1))  # the bias does something


def test_lemma_equal_cosines_with_the_template_change_no_answer():
    """Of the closed and of the iterated form."""
    z, target = unit(400, 12), unit(12, seed=1)
    across = unit(9, 12, seed=2)
    across = F.normalize(across - (across @ target)[:, None] * target, dim=-1)
    classes = 0.6 * target + 0.8 * across
    before = (z @ classes.T).argmax(1)
    for moved in (slerp(z, target, 1.0, 0.9), iterated(z, target, 0.05, 10, 0.9)):
        assert torch.equal((moved @ classes.T).argmax(1), before)


def test_the_blank_template_is_the_mean_of_80_prompts_or_those_given(vit):
    """With an empty class, as a bank makes it; the templates are open_clip's."""
    assert len(IMAGENET_TEMPLATES) == 80 and all(template.count("{}") == 1 for template in IMAGENET_TEMPLATES)
    like = torch.zeros(1, dtype=torch.float64)
    blank = defend(vit, "clipure_cos_closed").blank(like)
    one = vit.encode_text([template.replace("{}", "") for template in IMAGENET_TEMPLATES])
    torch.testing.assert_close(blank, F.normalize(one.mean(0), dim=0))
    torch.testing.assert_close(defend(vit, "clipure_cos_closed", templates=["a {}."]).blank(like), vit.encode_text(["a ."])[0])


def test_lengths_stay_and_the_gradient_of_the_released_form_dies(vit, images, tmp_path):
    """The embedding keeps its length; per image, the released form passes next to nothing and the closed one passes all but a little."""
    x = images[:1].requires_grad_(True)
    text_KD = vit.text_bank(NAMES, TEMPLATES)

    def slope(name: str) -> float:
        """Size of the gradient of the margin between two classes."""
        defended = make(name, vit, tmp_path)
        encoding = encode_in_stages(defended, x)
        torch.testing.assert_close(encoding.embedding_BD.norm(dim=-1), vit.encode(x).embedding_BD.norm(dim=-1))
        logits = defended.logits(encoding, text_KD)[0]
        return float(torch.autograd.grad(logits[0] - logits[1], x)[0].norm())

    (plain,) = torch.autograd.grad((vit(x, text_KD)[0, 0] - vit(x, text_KD)[0, 1]), x)
    assert slope("clipure_cos_release") < 1e-12 * float(plain.norm())
    assert slope("clipure_cos_closed") > 0.1 * float(plain.norm())


@pytest.mark.parametrize("name, settings, words", [
    ("clipure_cos_release", {"eta": 0}, "eta = 0"), ("clipure_cos_release", {"steps": 0}, "steps = 0"),
    ("clipure_cos_sane", {"step": -1.0}, "step = -1.0"), ("clipure_cos_sane", {"kappa": 1.0}, r"outside \[0, 1\)"),
    ("clipure_cos_closed", {"degrees": 181}, "degrees = 181"), ("clipure_cos_closed", {"kappa": -0.1}, "kappa = -0.1"),
])  # fmt: skip
def test_bad_settings_are_named(vit, name, settings, words):
    """Steps, angles and shares out of range."""
    with pytest.raises(ConfigError, match=words):
        defend(vit, name, **settings)
