"""What speeds a step up, and what was tried and does not: each without and with it, the same arithmetic on the same batch.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from aft.clip import ModelSpec, load_model
from aft.clip.matmul import products, torchs_products, use_onednn, use_torch
from aft.clip.weights import build_clip, describe
from bench.speed.row import Effort, Found, NotHere, ratios
from bench.speed.setting import BASE, MINI, WARM

Pass = Callable[[], object]


def without_over_with(
    without: Pass, with_it: Pass, effort: Effort, wanted: int, told: dict[str, object], before: Mapping[str, Pass] | None = None
) -> Found:
    """Seconds of both in turn, each first every second time; above 1: it pays.

    Args:
        without, with_it: one pass of each.
        effort: may cut down the repeats.
        wanted: repeats.
        told: what else is to be known.
        before: what to do before each pass ``without`` or ``with``, which is not timed.
    """
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    runs = {"without": without, "with": with_it}
    for turn in range(effort.repeats(wanted) + WARM):
        for name in sorted(runs, reverse=bool(turn % 2)):
            if before is not None:
                before[name]()
            began = time.perf_counter()
            runs[name]()
            if effort.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    kept = {name: times[WARM:] for name, times in seconds.items()}
    return Found(ratios(kept["without"], kept["with"]), kept, told)


def tower_of(clip: ModelSpec, effort: Effort) -> tuple[nn.Module, int]:
    """A frozen image tower in eval mode, and the side of its images."""
    model = load_model(clip)
    return model.visual.to(effort.on).requires_grad_(False), model.record.resolution


def attack_pass(tower: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Forward and gradient of the input: what attacks are made of."""
    leaf_BCHW = images_BCHW.detach().requires_grad_(True)
    return torch.autograd.grad(tower(leaf_BCHW).float().square().sum(), leaf_BCHW)[0]


def undone(
    undo: Callable[[nn.Module], None], clip: ModelSpec, batch_size: int, repeats: int,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Callable[[Effort], Found]:  # fmt: skip
    """A tower as torch has it against ours, in the pass of an attack.

    Args:
        undo: takes the one change back, in place.
        clip, batch_size, repeats: of the row.
        around: both sides, such as ``torchs_products``.
    """

    def measure(effort: Effort) -> Found:
        """Both towers frozen."""
        ours, side = tower_of(clip, effort)
        torchs = copy.deepcopy(ours)
        undo(torchs)
        images_BCHW = torch.rand(batch_size, 3, side, side, device=effort.on)
        with around():
            told: dict[str, object] = {"model": clip.name, "batch_size": batch_size, "products": products()}
            passes = (lambda: attack_pass(torchs, images_BCHW)), (lambda: attack_pass(ours, images_BCHW))
            return without_over_with(*passes, effort, repeats, told)

    return measure


def onednn(effort: Effort) -> Found:
    """Matrix products as torch makes them against :mod:`aft.clip.matmul`, in the pass of an attack."""
    if effort.device != "cpu" or not use_onednn():
        raise NotHere("torch's own products are kept here: an Intel processor, a GPU, or AFT_ONEDNN=0")
    tower, side = tower_of(MINI, effort)
    images_BCHW = torch.rand(64, 3, side, side)

    def one_pass() -> None:
        """The same on both sides."""
        attack_pass(tower, images_BCHW)

    with torchs_products():  # what was there before comes back, whatever happens
        told: dict[str, object] = {"model": MINI.name, "batch_size": 64, "products": "torch without, onednn with"}
        return without_over_with(one_pass, one_pass, effort, 20, told, {"without": use_torch, "with": use_onednn})


def bf16(effort: Effort) -> Found:
    """fp32 against bf16 autocast in the pass of an attack."""
    tower, side = tower_of(MINI, effort)
    images_BCHW = torch.rand(64, 3, side, side, device=effort.on)

    def low() -> None:
        """In bf16; the gradient is fp32 again."""
        with torch.autocast(effort.device, torch.bfloat16):
            attack_pass(tower, images_BCHW)

    return without_over_with(lambda: attack_pass(tower, images_BCHW), low, effort, 10, {"model": MINI.name, "batch_size": 64})


def channels_last(effort: Effort) -> Found:
    """Usual memory order against channels last, in the pass of an attack on a ResNet-50 tower."""
    tower = build_clip(describe("RN50", None).config).get_submodule("visual").to(effort.on).eval().requires_grad_(False)
    other = copy.deepcopy(tower).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images_BCHW = torch.rand(4, 3, 224, 224, device=effort.on)
    passes = (lambda: attack_pass(tower, images_BCHW)), (lambda: attack_pass(other, images_BCHW))
    return without_over_with(*passes, effort, 10, {"model": "RN50", "batch_size": 4})


def fused(effort: Effort) -> Found:
    """torch's AdamW as it is by default against its fused kernel, on the weights of a ViT-B/32 image tower."""
    tower, _ = tower_of(BASE, effort)
    steps = []
    for settings in ({}, {"fused": True}):
        weights = [p.detach().clone().requires_grad_(True) for p in tower.parameters()]
        for weight in weights:
            weight.grad = torch.full_like(weight, 1e-3)
        steps.append(torch.optim.AdamW(weights, lr=1e-5, **settings).step)  # type: ignore[arg-type]
    return without_over_with(*steps, effort, 10, {"model": BASE.name, "weights": sum(p.numel() for p in tower.parameters())})
