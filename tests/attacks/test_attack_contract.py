"""What holds for every attack: no trace, any caller's mode, inside ball and box, one image at a time, and errors that name the remedy."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from aft.attacks import APGD, FGSM, PGD, APGDTargeted, Attack, ClassificationObjective, Judged, sample_keys, undisturbed
from aft.errors import InputError, RunError


def fail(judged, rows):
    raise ValueError("planned")


def state_of(network):
    """Everything that an attack could leave behind."""
    return {
        "modes": [part.training for part in network.modules()],
        "flags": [weight.requires_grad for weight in network.parameters()],
        "grads": [None if weight.grad is None else weight.grad.clone() for weight in network.parameters()],
        "values": [value.clone() for value in network.state_dict().values()],
        "generator": torch.get_rng_state(),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return one == other if not isinstance(one, list) else all(map(same, one, other))


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_attack_leaves_no_trace(attack, network, batch, objective_of, fails, watch):
    """``.grad``, mixed ``requires_grad``, nested modes, BatchNorm statistics and RNG state are as before, also after an exception."""
    images, labels, keys = batch
    network[1].eval()
    network[4].weight.requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    before, image_before = state_of(network), images.clone()
    seen_modes = []

    def note(judged, rows):
        seen_modes.append([part.training for part in network.modules()] + [weight.requires_grad for weight in network.parameters()])
        torch.rand(3)
        return fail(judged, rows) if fails else judged

    objective = watch(objective_of(network, labels), act=note)
    if fails:
        with pytest.raises(ValueError, match="planned"):
            attack(objective, images, keys)
    else:
        attack(objective, images, keys)
    after = state_of(network)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert torch.equal(images, image_before)
    assert seen_modes and not any(any(flags) for flags in seen_modes), "the attack did not run on a frozen network in eval mode"


def test_undisturbed_restores_shared_and_nested_modules():
    """A module named twice, or inside another, and a weight in two places come back as they were; the order does not matter."""
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 2)
    outer.weight = inner.weight
    both = nn.Sequential(inner, outer)
    inner.eval()
    outer.bias.requires_grad_(False)
    with pytest.raises(KeyError), undisturbed([inner, both, inner]):
        assert not any(part.training for part in both.modules()) and not any(w.requires_grad for w in both.parameters())
        raise KeyError
    assert (both.training, inner.training, outer.training) == (True, False, True)
    assert inner.weight.requires_grad and inner.bias.requires_grad and not outer.bias.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attack_works_under_any_mode_of_the_caller(attack, network, batch, objective_of, mode):
    """Under no_grad and inference_mode, with inputs that are inference tensors, the result is that of a plain call."""
    images, labels, keys = batch
    expected = attack(objective_of(network, labels), images, keys)
    with mode():
        copies = [part.clone() for part in (images, labels, keys)]
        result = attack(objective_of(network, copies[1]), copies[0], copies[2])
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode) and not torch.is_grad_enabled()
    assert torch.equal(result.x_BCHW, expected.x_BCHW)
    assert not result.x_BCHW.is_inference()


def test_a_search_works_on_copies_of_its_own(batch, objective_of, network):
    """What a search is handed may be changed in place and needs no care for inference tensors: the caller's tensors stay as they are."""

    class Careless(FGSM):
        def search(self, objective, x, keys):
            assert not x.is_inference() and not keys.is_inference() and torch.is_grad_enabled()
            x.zero_().requires_grad_(True)
            keys.zero_()
            return super().search(objective, x.detach(), keys)

    images, labels, keys = batch
    with torch.inference_mode():
        copies = images.clone(), keys.clone()
        Careless(eps="1/255")(objective_of(network, labels), *copies)
    before = images.clone(), keys.clone()
    Careless(eps="1/255")(objective_of(network, labels), images, keys)
    assert all(map(torch.equal, (images, keys, *copies), (*before, *before)))


@pytest.mark.parametrize(("norm", "eps"), [
    *((norm, eps) for norm in ("linf", "l2") for eps in (0.0, 1 / 255, 4 / 255, 0.3, 1.0)), *(("l1", eps) for eps in (4 / 255, 1.0, 12.0))
])  # fmt: skip
@pytest.mark.parametrize("kind", [PGD, FGSM, APGD, APGDTargeted])
def test_result_is_inside_ball_and_box(kind, eps, norm, network, batch, objective_of):
    """fp32 images, some at the edges 0 and 1: inside to the last bit, finite, detached; eps 0 gives back the clean images."""
    images, labels, keys = batch
    images = images.clone()
    images[0], images[1], images[2, :, ::2] = 0, 1, 1
    settings = {"steps": 3} if kind is not FGSM else {}
    settings |= {"relative_step_size": 0.7} if kind is PGD else {"targets": 2} if kind is APGDTargeted else {}
    x = kind(eps=eps, norm=norm, **settings)(objective_of(network, labels), images, keys).x_BCHW
    change = (x.double() - images.double()).flatten(1)
    assert torch.linalg.vector_norm(change, ord={"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1).max() <= eps
    assert x.min() >= 0 and x.max() <= 1 and x.isfinite().all()
    assert x.dtype == torch.float32 and not x.requires_grad and x.grad_fn is None
    assert eps > 0 or torch.equal(x, images)


def test_batch_of_one_and_of_many_agree(attack, precise, batch, objective_of):
    """Neither the neighbours nor the order matter: in float64 verdicts agree exactly, losses to 1e-10, images to the same."""
    images, labels, keys = batch
    images = images.double()
    whole = attack(objective_of(precise, labels), images, keys)
    order = torch.tensor([5, 2, 11, 0, 7])
    for rows in [order[:1], order[1:2], order]:
        part = attack(objective_of(precise, labels[rows]), images[rows], keys[rows])
        assert part.broken_B is None or torch.equal(part.broken_B, whole.broken_B[rows])
        assert torch.allclose(part.loss_B, whole.loss_B[rows], rtol=1e-10, atol=1e-12)
        assert torch.allclose(part.x_BCHW, whole.x_BCHW[rows], rtol=0, atol=1e-10)
    assert whole.x_BCHW.dtype == torch.float64


def test_best_is_what_a_fresh_forward_sees(attack, network, batch, objective_of):
    """Where a verdict is given, loss and verdict are those of the returned image, never of another iterate."""
    images, labels, keys = batch
    objective = objective_of(network, labels)
    result = attack(objective, images, keys)
    if result.broken_B is None:
        assert attack.describe()["keep"] == "last"
        return
    judged = objective_of(network.eval(), labels)(result.x_BCHW, torch.arange(12))
    assert torch.equal(judged.broken_n, result.broken_B) and result.broken_B.any() and not result.broken_B.all()
    if "targeted" not in attack.name:  # these raise another loss
        assert torch.allclose(judged.loss_n, result.loss_B, atol=1e-5)
        assert (result.gain_B >= 0).all()


def test_half_precision_does_not_silence_the_gradient():
    """A classifier in fp16 at batch 256, sure of itself: a mean's gradient rounds to zero, the attack's sum does not (PMG-AFT issue 1)."""
    weight = torch.zeros(48, 4).half()
    weight[:, 0] = 0.59
    images, labels = torch.full((256, 3, 4, 4), 0.5), torch.zeros(256, dtype=torch.int64)
    objective = ClassificationObjective(lambda x: x.flatten(1).half() @ weight, labels)
    leaf = images.clone().requires_grad_(True)
    assert (torch.autograd.grad(objective(leaf, labels).loss_n.mean(), leaf)[0] == 0).all(), "the trap is not set"
    result = PGD(eps=0.1, step_size=0.1, steps=1, random_start=False)(objective, images, sample_keys(0, 0, torch.arange(256)))
    assert torch.allclose(result.x_BCHW, images - 0.1)


def test_autocast_acts_inside_the_objective_only(network, batch, objective_of):
    """Under bf16 autocast the perturbation stays fp32 and inside; most of its signs are those without autocast."""
    images, labels, keys = batch
    attack = FGSM(eps="4/255")
    plain = attack(objective_of(network, labels), images, keys).x_BCHW
    with torch.autocast("cpu", torch.bfloat16):
        cast = attack(objective_of(network, labels), images, keys).x_BCHW
        l2 = APGD(eps=0.5, norm="l2", steps=3)(objective_of(network, labels), images, keys).x_BCHW
    assert cast.dtype == torch.float32 and (cast - images).abs().max() <= 4 / 255
    assert not torch.equal(cast, plain) and ((cast - plain).abs() < 1e-6).float().mean() > 0.9
    assert torch.linalg.vector_norm((l2 - images).double().flatten(1), dim=1).max() <= 0.5


def test_half_images_become_fp32(network, batch, objective_of):
    """Images in lower precision are perturbed in fp32."""
    images, labels, keys = batch
    result = FGSM(eps="4/255")(objective_of(network, labels), images.bfloat16(), keys)
    assert result.x_BCHW.dtype == torch.float32 and (result.x_BCHW - images.bfloat16().float()).abs().max() <= 4 / 255


def poison(what):
    """Makes sample 0's loss (or only its gradient) not a number."""

    def act(judged, rows):
        if what == "loss":
            return Judged(judged.loss_n * torch.where(rows == 0, torch.nan, 1.0), judged.broken_n | (rows == 0))
        root_of_zero = torch.where(rows == 0, judged.loss_n - judged.loss_n.detach(), 1.0).sqrt()
        return judged._replace(loss_n=judged.loss_n + torch.where(rows == 0, root_of_zero, 0.0))

    return act


@pytest.mark.parametrize("call", [1, 3])
def test_nan_loss_falls_back_to_the_last_good_iterate(call, network, batch, objective_of, watch):
    """NaN at an iterate: the image goes back to the one before (at first: the clean one) and is counted; its neighbours do not notice."""
    images, labels, keys = batch
    attack = PGD(eps="6/255", step_size="2/255", steps=4)
    clean_run = attack(objective_of(network, labels), images, keys)
    result = attack(watch(objective_of(network, labels), call, poison("loss")), images, keys)
    expected = images if call == 1 else dataclasses.replace(attack, steps=call - 2)(objective_of(network, labels), images, keys).x_BCHW
    assert torch.equal(result.x_BCHW[0], expected[0])
    assert torch.equal(result.x_BCHW[1:], clean_run.x_BCHW[1:])
    assert result.finite_B.tolist() == [False] + [True] * 11 and clean_run.finite_B.all()


@pytest.mark.parametrize("late", [False, True], ids=["from_the_first_call", "at_the_last_step"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_never_leaves_an_attack(attack, network, batch, objective_of, what, late, watch):
    """NaN in a loss or a gradient: every image finite and inside [0, 1], the sample counted, and no NaN passes for a break."""
    images, labels, keys = batch
    from_call = attack.describe()["steps"] if late else 1
    result = attack(watch(objective_of(network, labels), from_call, poison(what)), images, keys)
    assert result.x_BCHW.isfinite().all() and result.x_BCHW.min() >= 0 and result.x_BCHW.max() <= 1
    seen = what == "loss" or attack.name != "square"  # which takes no gradient
    assert result.finite_B[1:].all() and (late or not seen or not result.finite_B[0])
    assert late or what == "gradient" or result.broken_B is None or not result.broken_B[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, k: ((x * 255).byte(), k), r"x_BCHW is torch.uint8.*images.float\(\) / 255"),
        (lambda x, k: (x * 255, k), r"holds values from .* to 2\d\d.*divide grey levels by 255"),
        (lambda x, k: (x - 0.9, k), "holds values from -0.9"),
        (lambda x, k: (x.masked_fill(x > 0.7, math.nan), k), "holds values from nan.*drop images with NaN"),
        (lambda x, k: (x.masked_fill(x > 0.7, math.inf), k), "to inf"),
        (lambda x, k: (x[0], k), r"shape \(3, 16, 16\).*\[B, C, H, W\]"),
        (lambda x, k: (x[:0], k[:0]), "one image or more"),
        (lambda x, k: (x, k[:-1]), r"keys_B is torch.int64 of shape \(11,\) for 12 images.*sample_keys"),
        (lambda x, k: (x, k.float()), "keys_B is torch.float32"),
    ],
)
def test_bad_input_is_named(change, message, network, batch, objective_of):
    """What came, what is allowed, what to do."""
    images, labels, keys = batch
    with pytest.raises(InputError, match=message):
        FGSM(eps="1/255")(objective_of(network, labels), *change(images, keys))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda judged, rows: Judged(judged.loss_n.mean()), r"shape \(\) for 12 images.*not reduced"),
        (lambda judged, rows: Judged(judged.loss_n.half()), r"the loss is torch.float16.*\.float\(\)"),
        (lambda judged, rows: Judged(judged.loss_n.detach()), "no gradient by the images.*detach"),
        (lambda judged, rows: Judged(torch.ones(12, requires_grad=True) * 2), "no gradient by the images"),
    ],
)
def test_bad_objectives_are_named(act, message, network, batch, objective_of, watch):
    """A reduced, half-precision or graphless loss would make a weak attack that looks like robustness: it is refused."""
    images, labels, keys = batch
    with pytest.raises(InputError, match=message):
        PGD(eps="1/255", step_size="1/255", steps=1)(watch(objective_of(network, labels), act=act), images, keys)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_out_of_memory_is_named(error, network, batch, objective_of, watch):
    """The error names batch, steps and remedy, keeps torch's own as its cause, and all is restored; other errors pass as they are."""
    images, labels, keys = batch
    before = state_of(network)
    attack = PGD(eps="1/255", step_size="1/255", steps=7)

    def stop(judged, rows):
        raise error

    with pytest.raises(RunError, match=r"attack pgd \(7 steps\) on a batch of 12 images.*make the batch smaller") as caught:
        attack(watch(objective_of(network, labels), act=stop), images, keys)
    assert caught.value.__cause__ is error
    assert all(same(before[name], value) for name, value in state_of(network).items())
    error = RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="shape mismatch") as caught:
        attack(watch(objective_of(network, labels), act=stop), images, keys)
    assert not isinstance(caught.value, RunError)


def test_a_targeted_attack_needs_an_objective_it_can_aim(network, batch, objective_of):
    """An objective without classes is refused by name; too many targets are, too."""
    images, labels, keys = batch

    class Distance:
        modules = ()

        def __call__(self, x, rows):
            return Judged(x.flatten(1).sum(1))

    with pytest.raises(InputError, match="Distance cannot be aimed.*wrong_classes and towards"):
        APGDTargeted(eps="1/255", steps=2)(Distance(), images, keys)
    with pytest.raises(InputError, match="9 targets need 10 classes"):
        APGDTargeted(eps="1/255", steps=2)(objective_of(network, labels), images, keys)
    assert PGD(eps="1/255", step_size="1/255", steps=2, keep="best")(Distance(), images, keys).broken_B is None


def test_settings_are_frozen_keyword_only_and_described(attack):
    """Settings cannot be changed or given by place; eps is a number; the description is plain and says what cards need."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.eps = 0.5
    with pytest.raises(TypeError):
        type(attack)(0.1)
    description = attack.describe()
    assert {"name", "norm", "eps", "steps", "step_size", "restarts", "keep"} <= set(description)
    assert all(isinstance(value, str | int | float | bool) for value in description.values())
    assert attack.eps == description["eps"] and isinstance(attack.eps, float)
    assert copy.deepcopy(attack) == attack


def test_attacks_are_made_from_yaml():
    """``class_path`` and ``init_args`` as configurations write them make the attack, with eps as text."""
    jsonargparse = pytest.importorskip("jsonargparse", reason="configurations are read by jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--attack", type=Attack)
    arguments = {"eps": "2/255", "step_size": "2/255", "steps": 2, "norm": "linf"}
    for name, init_args in [("PGD", arguments), ("FGSM", {"eps": "2/255"}), ("APGD", {"eps": "2/255"}), ("APGDTargeted", {"eps": 0.1})]:
        made = parser.instantiate(parser.parse_object({"attack": {"class_path": f"aft.attacks.{name}", "init_args": init_args}}))
        assert made.attack == {"PGD": PGD, "FGSM": FGSM, "APGD": APGD, "APGDTargeted": APGDTargeted}[name](**init_args)
    with pytest.raises(Exception, match="stepz"):
        parser.parse_object({"attack": {"class_path": "aft.attacks.PGD", "init_args": {**arguments, "stepz": 1}}})
