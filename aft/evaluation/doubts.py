"""Automatic doubts: what must hold of a model and of an attack before a robust accuracy is believed.

Each doubt is a function of a :class:`aft.evaluation.case.Case` that returns what is wrong, or nothing. Numbers (E5 ...) and thresholds are
those of ``docs/checks.md``. A difference in accuracy counts only above its threshold and for more than two images.
Sources: AutoAttack's checks; Pintor et al., arXiv 2106.09947 (indicators of attack failure); Carlini et al., arXiv 1902.06705;
Athalye et al., arXiv 1802.00420.

Shapes: n images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aft.attacks import APGD, FGSM, PGD, APGDTargeted, Square
from aft.attacks.objectives import CLASSES_NEEDED
from aft.attacks.threat_model import Norm, threat_model
from aft.evaluation.case import TRACED, Case

#: A doubt: what is wrong, in words, or nothing.
Doubt = Callable[[Case], str | None]

FEWEST = 2
SMALLEST_GRADIENT = 1e-30
BLACK_BOX_STEPS = 500
LADDER = (0.5, 1, 2, 4, 8)


def probabilities(case: Case) -> str | None:
    """E5: logits that lie in [0, 1] and sum to one are probabilities, whose cross-entropy has almost no gradient."""
    logits_nK = case.clean_nK
    alike = logits_nK.min() >= 0 and logits_nK.max() <= 1 and bool(((logits_nK.sum(1) - 1).abs() < 1e-5).all())
    return "the outputs are probabilities, not logits: take them before the softmax" if alike else None


def randomness(case: Case) -> str | None:
    """E6: five forwards of the same images give the same logits."""
    looks = [torch.nn.functional.normalize(case.look(case.images_nCHW).double(), dim=1) for _ in range(5)]
    most = max(float((one - looks[0]).norm(dim=1).max()) for one in looks)
    return f"five forwards of one image differ by {most:.2g}: attack the mean over draws (autoattack_rand)" if most > 1e-4 else None


def training_mode(case: Case) -> str | None:
    """E7: no part is in training mode."""
    training = [type(part).__name__ for module in case.modules for part in module.modules() if part.training]
    return f"{len(training)} parts are in training mode ({training[0]} ...): call model.eval()" if training else None


def neighbours(case: Case) -> str | None:
    """E8: an image's logits do not depend on its batch, beyond a thousandth of the spread of the logits."""
    images_nCHW = case.images_nCHW
    alone_nK = torch.cat([case.look(one[None]) for one in images_nCHW[:8]])
    beside_nK = case.look(images_nCHW.flip(0)).flip(0)[: len(alone_nK)]
    among_nK = case.clean_nK[: len(alone_nK)]
    most = max(float((among_nK - other).abs().max()) for other in (alone_nK, beside_nK)) / case.spread
    return f"an image's logits change by {most:.2g} of their spread with its neighbours: score images alone" if most > 1e-3 else None


def no_gradient(case: Case) -> str | None:
    """E9: a gradient reaches the input."""
    return "no gradient reaches the images: attack it by BPDA or without gradients" if case.ce_gradient is None else None


def zero_gradient(case: Case) -> str | None:
    """E10: no image's gradient is zero throughout, and at most one entry in a hundred is (DLR; margin below three classes)."""
    gradient_nCHW = case.gradient("dlr" if case.classes >= 3 else "margin")
    if gradient_nCHW is None:
        return None
    flat_nP = gradient_nCHW.flatten(1)
    dead, zeros = int((flat_nP == 0).all(1).sum()), float((flat_nP == 0).float().mean())
    if dead or zeros > 0.01:
        return f"{dead} images have no gradient at all and {100 * zeros:.0f} % of all its entries are zero: gradients are masked"
    return None


def saturation(case: Case) -> str | None:
    """E11: cross-entropy still has a gradient in fp32, and an attack on logits of unit spread finds no more than one point more."""
    if case.ce_gradient is None:
        return None
    faint = float((case.ce_gradient.flatten(1).abs().amax(1) < SMALLEST_GRADIENT).float().mean())
    if faint > 0.01:
        return f"cross-entropy has no gradient on {100 * faint:.0f} % of the images: the logits' scale hides it"
    calm_n = case.run(case.pgd(), logits=lambda x: standardised(case.logits(x)))
    return _more_found(case, calm_n, "an attack on logits of unit spread", 0.01)


def standardised(logits_nK: Tensor) -> Tensor:
    """Each row with unit standard deviation, the deviation taken as a constant."""
    return logits_nK / logits_nK.detach().std(1, keepdim=True).clamp_min(1e-12)


def no_climb(case: Case) -> str | None:
    """E12: the attack raises the loss of 95 % of the images."""
    if case.traced is None:
        return None
    risen = float((case.traced.broken_Sn.any(0) | (case.traced.found.gain_B > 0)).float().mean())
    return f"the loss rises on {100 * risen:.0f} % of the images only: wrong sign or labels, or no step" if risen < 0.95 else None


def unfinished(case: Case) -> str | None:
    """E13: in its last ten steps the best loss rises by at most a twentieth of its whole range, for 95 % of the unbroken images."""
    if case.traced is None or len(case.traced.losses_Sn) <= 11:
        return None
    best_Sn = case.traced.losses_Sn.cummax(0).values
    whole_n = (best_Sn[-1] - best_Sn[0]).clamp_min(1e-12)
    late_n = ((best_Sn[-1] - best_Sn[-11]) / whole_n > 0.05) & ~case.traced.broken_Sn.any(0)
    share = _share(late_n)
    if share > 0.05 and late_n.sum() > FEWEST:
        return f"the loss of {100 * share:.0f} % of the images still rises at the end: more steps"
    return None


def silent_success(case: Case) -> str | None:
    """E14: whoever was broken on the way is broken by the image that is returned."""
    if case.traced is None:
        return None
    lost = int((case.traced.broken_Sn.any(0) & case.right(case.traced.found.x_BCHW)).sum())
    return f"{lost} images were broken on the way and are not at the end" if lost else None


def more_steps(case: Case) -> str | None:
    """E15: six times the steps break no more than one point more."""
    if case.traced is None:
        return None
    few_n, many_n = case.run(case.pgd()), case.right(case.traced.found.x_BCHW)
    extra = int((few_n & ~many_n).sum())
    if extra > FEWEST and extra / len(few_n) > 0.01:
        return f"{TRACED * case.steps} steps of PGD break {extra} of {len(few_n)} images more than {case.steps}"
    return None


def more_restarts(case: Case) -> str | None:
    """E16: five starts break no more than one point more than one."""
    return _stronger(case, "five random starts", lambda: case.run(case.pgd(restarts=5)))


def one_step(case: Case) -> str | None:
    """E17: one step is not as strong as many, where many do anything."""
    if case.traced is None:
        return None
    one, many = _share(case.run(FGSM(eps=case.eps, norm=case.norm))), _share(case.white_box_n)
    weaker = many - one
    if weaker > 0.005 and weaker * len(case.labels_n) > FEWEST:
        return f"one step leaves {100 * one:.1f} %, many leave {100 * many:.1f} %: gradients mislead"
    return None


def black_box(case: Case) -> str | None:
    """E18: Square finds nothing to speak of that gradients have not found; L-inf."""
    square_n = case.run(Square(eps=case.eps, steps=BLACK_BOX_STEPS), "margin")
    return _more_found(case, square_n, "Square, without gradients,", 0.002)


def transfer(case: Case) -> str | None:
    """E19: images made against another model, or this one undefended, break at most one point more than those made against this one."""
    others = [*case.siblings, *([] if case.undefended is None else [case.undefended])]
    found = [_more_found(case, case.run(case.pgd(), logits=other), "PGD against another model", 0.01) for other in others]
    return next((text for text in found if text), None)


def monotony(case: Case) -> str | None:
    """E20: a larger radius never leaves more images right."""
    if case.traced is None:
        return None
    largest = threat_model(case.norm, case.eps).largest(case.images_nCHW[0].numel())
    radii = [case.eps * factor for factor in LADDER if case.eps * factor <= largest]
    left = [_share(case.run(case.pgd(eps=eps))) for eps in radii]
    worst = max((after - before for before, after in pairwise(left)), default=0.0)
    if worst > 0.005 and worst * len(case.labels_n) > FEWEST:
        return f"accuracy over growing eps is {', '.join(f'{100 * share:.0f}' for share in left)} %: it should only fall"
    return None


def unbounded(case: Case) -> str | None:
    """E21: with the whole box to move in, the attack leaves at most one point; L-inf."""
    attack = PGD(eps=1.0, steps=50, relative_step_size=0.05, keep="best")
    left_n = case.run(attack) if case.traced is not None else torch.ones_like(case.labels_n, dtype=torch.bool)
    if _share(left_n) > 0.01 and left_n.sum() > FEWEST:
        return f"at eps = 1 {100 * _share(left_n):.0f} % are still right: the attack fails, not the images"
    return None


def random_noise(case: Case) -> str | None:
    """E22: the attack is stronger than the worst of ten random points by more than one point, for L-inf and eps of 1/255 or more."""
    if case.eps < 1 / 255 or case.traced is None:
        return None
    noise_n = torch.ones_like(case.labels_n, dtype=torch.bool)
    start = case.pgd().threat.random_start
    for draw in range(10):
        noise_n &= case.right(start(case.images_nCHW, case.keys_n, 1000 + draw))
    noise, white = _share(noise_n), _share(case.white_box_n)
    if noise - white <= 0.01 and white < 1:
        return f"random noise leaves {100 * noise:.1f} %, the attack {100 * white:.1f} %: it does no more than noise"
    return None


def own_optimisation(case: Case) -> str | None:
    """E25: the forward pass takes no gradients of its own, nor over a tenth more operations than the undefended model's."""
    with counted_gradients() as calls, torch.enable_grad():
        case.logits(case.images_nCHW[:2])
    if calls:
        return f"the forward pass takes {len(calls)} gradients of its own: an adaptive attack must see through it"
    if case.undefended is None:
        return None
    ratio = operations(case.logits, case.images_nCHW[:2]) / max(1, operations(case.undefended, case.images_nCHW[:2]))
    return f"the forward pass costs {ratio:.2g} undefended ones: an adaptive attack must see through what it does" if ratio > 1.1 else None


def operations(logits: Callable[[Tensor], Tensor], images_nCHW: Tensor) -> int:
    """Floating-point operations of one call, as torch counts them (matrix products, convolutions and attention)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits(images_nCHW)
    return int(counter.get_total_flops())


def each_loss(case: Case) -> dict[str, float]:
    """E24: the share of the images that APGD leaves right by each loss alone, and by all of them (``union``).

    Cross-entropy; DLR from three classes on; targeted DLR from four. It judges nothing: gradients that one loss hides show in the others.
    """
    if case.ce_gradient is None:
        return {}
    untargeted = APGD(eps=case.eps, norm=case.norm, steps=case.steps)
    left = {loss: case.run(untargeted, loss) for loss in ("ce", "dlr") if case.classes >= CLASSES_NEEDED[loss]}
    if case.classes >= CLASSES_NEEDED["dlr_targeted"]:
        left["dlr_targeted"] = case.run(APGDTargeted(eps=case.eps, norm=case.norm, steps=case.steps, targets=min(3, case.classes - 1)))
    return {**{loss: _share(left_n) for loss, left_n in left.items()}, "union": _share(torch.stack(list(left.values())).all(0))}


def order_of_classes(case: Case) -> str | None:
    """E27: with shuffled labels accuracy is that of chance."""
    order = torch.randperm(len(case.labels_n), generator=torch.Generator().manual_seed(case.seed)).to(case.labels_n.device)
    shuffled = float((case.clean_nK.argmax(1) == case.labels_n[order]).float().mean())
    expected = float((case.labels_n.bincount(minlength=case.classes) / len(order)).square().sum())
    bound = expected + 3 * (expected * (1 - expected) / len(order)) ** 0.5
    return f"with shuffled labels {100 * shuffled:.0f} % are right: labels leak into the images" if shuffled > bound else None


def another_function(case: Case) -> str | None:
    """E28: with a graph, as an attack calls it, the model says what it says when it is scored."""
    with torch.enable_grad():
        attacked_nK = case.logits(case.images_nCHW.clone().requires_grad_()).detach()
    most = float((attacked_nK - case.clean_nK).abs().max()) / case.spread
    return f"the attack sees logits that differ by {most:.2g} of their spread from those that are scored" if most > 1e-4 else None


def wrong_slope(case: Case) -> str | None:
    """E29: along the gradient the loss rises by what the gradient says, within 5 %, for most images (central difference)."""
    gradient_nCHW = case.gradient("margin")
    if gradient_nCHW is None:
        return None
    length_n = gradient_nCHW.flatten(1).norm(dim=1)
    direction_nCHW = gradient_nCHW / length_n.clamp_min(1e-30)[:, None, None, None]
    objective, rows_n = case.objective("margin"), torch.arange(len(length_n), device=length_n.device)
    with torch.no_grad():
        best_n = torch.full_like(length_n, torch.inf)
        for step in (1e-1, 3e-2, 1e-2, 3e-3):  # the curve wants a short one, rounding a long one
            ahead_n, behind_n = (objective(case.images_nCHW + sign * step * direction_nCHW, rows_n).loss_n for sign in (1, -1))
            slope_n = (ahead_n - behind_n) / (2 * step)
            best_n = torch.minimum(best_n, (slope_n - length_n).abs() / length_n.clamp_min(1e-30))
    off = float((best_n > 0.05).float().mean())
    return f"on {100 * off:.0f} % of the images the gradient is not the slope of the loss" if off > 0.5 else None


def adaptive_steps(case: Case) -> str | None:
    """E23: APGD is not weaker than PGD of as many steps by more than one point, nor PGD weaker than it by more than three."""
    if case.traced is None:
        return None
    pgd, apgd = (_share(case.run(attack)) for attack in (case.pgd(), APGD(eps=case.eps, norm=case.norm, steps=case.steps)))
    told = f"PGD leaves {100 * pgd:.1f} %, APGD {100 * apgd:.1f} %"
    if apgd - pgd > 0.01 and (apgd - pgd) * len(case.labels_n) > FEWEST:
        return f"{told}: adaptive steps go astray"
    if pgd - apgd > 0.03 and (pgd - apgd) * len(case.labels_n) > FEWEST:
        return f"{told}: fixed steps or cross-entropy fail here"
    return None


def eight_bits(case: Case) -> str | None:
    """E31: rounding the attacked images to grey levels saves at most two points."""
    if case.traced is None:
        return None
    rounded_n = case.right((case.traced.found.x_BCHW * 255).round() / 255)
    saved = _share(rounded_n) - _share(case.right(case.traced.found.x_BCHW))
    if saved > 0.02 and saved * len(case.labels_n) > FEWEST:
        return f"rounding to 8 bits saves {100 * saved:.1f} points: no such image can be stored"
    return None


#: Nearly free: on a few images, always.
CHEAP: dict[str, Doubt] = {
    "E5": probabilities, "E6": randomness, "E7": training_mode, "E8": neighbours, "E9": no_gradient, "E10": zero_gradient,
    "E25": own_optimisation, "E27": order_of_classes, "E28": another_function, "E29": wrong_slope,
}  # fmt: skip
#: Attacks of their own: on a subset, when asked for.
DEAR: dict[str, Doubt] = {
    "E11": saturation, "E12": no_climb, "E13": unfinished, "E14": silent_success, "E15": more_steps, "E16": more_restarts, "E17": one_step,
    "E18": black_box, "E19": transfer, "E20": monotony, "E21": unbounded, "E22": random_noise, "E23": adaptive_steps, "E31": eight_bits,
}  # fmt: skip


#: These have a meaning for L-inf alone.
LINF_ALONE = {"E18", "E21", "E22"}


def dear_of(norm: Norm) -> dict[str, Doubt]:
    """The dear doubts that apply to a norm."""
    return {name: doubt for name, doubt in DEAR.items() if norm == "linf" or name not in LINF_ALONE}


def doubted(case: Case, doubts: dict[str, Doubt]) -> dict[str, str]:
    """What is wrong, by the number of the check."""
    found = {name: doubt(case) for name, doubt in doubts.items()}
    return {name: text for name, text in found.items() if text is not None}


@contextmanager
def counted_gradients() -> Iterator[list[str]]:
    """Notes every call of ``torch.autograd.grad`` and ``backward`` while it is open."""
    calls: list[str] = []
    before = torch.autograd.grad, torch.autograd.backward

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """The original, noted."""

        def call(*arguments: Any, **settings: Any) -> Any:
            """Notes and calls."""
            calls.append(name)
            return original(*arguments, **settings)

        return call

    torch.autograd.grad, torch.autograd.backward = noting("grad", before[0]), noting("backward", before[1])
    try:
        yield calls
    finally:
        torch.autograd.grad, torch.autograd.backward = before


def _share(flags_n: Tensor) -> float:
    return float(flags_n.float().mean())


def _more_found(case: Case, others_n: Tensor, who: str, threshold: float) -> str | None:
    """Whether another attack breaks images that the white-box attacks left, beyond a threshold and for more than two."""
    extra = int((case.white_box_n & ~others_n).sum())
    if extra > FEWEST and extra / len(others_n) > threshold:
        return f"{who} breaks {extra} of {len(others_n)} images more: the attacks were too weak or gradients are masked"
    return None


def _stronger(case: Case, who: str, run: Callable[[], Tensor]) -> str | None:
    return None if case.traced is None else _more_found(case, run(), who, 0.01)
