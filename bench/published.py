"""Two training steps in the shape of released loops, to be faster than: written from what those loops are known to do, not from their code.

Both do the same mathematics as ours (a test compares their gradients in float64), so that only the way differs. What the released loops
do wrong beside being slow is left out: the attack's gradients are not left in the weights' ``.grad``.

Shapes: B images, C channels, H rows, W columns, K classes, D embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aft.batch import Batch
from aft.clip import ZeroShotModel


def start_in_ball(images_BCHW: Tensor, eps: float) -> Tensor:
    """A random point of the L-inf ball, by torch's global generator, cut to [0, 1]."""
    return (images_BCHW + torch.empty_like(images_BCHW).uniform_(-eps, eps)).clamp(0, 1)


def uphill(point_BCHW: Tensor, gradient_BCHW: Tensor, images_BCHW: Tensor, eps: float, step_size: float) -> Tensor:
    """One signed step, cut to the ball and to [0, 1]."""
    moved_BCHW = point_BCHW + step_size * gradient_BCHW.sign()
    return (images_BCHW + (moved_BCHW - images_BCHW).clamp(-eps, eps)).clamp(0, 1)


class TextEachStep:
    """The TeCoA lineage: every attack step encodes images *and* all class texts, and calls ``.backward()`` into all weights.

    Tokens are made anew for each batch. Afterwards one more pass trains the image tower by SGD.

    Args:
        model: copied, so that the caller's stays as it is.
        prompts: one text a class.
        eps, step_size: of the attack, in units of the pixel range.
        steps: k.
        lr: of SGD with momentum 0.9.

    Reference:
        Mao et al., arXiv 2212.07016, as released (cvlab-columbia/ZSRobust4FoundationModel); also PMG-AFT and TGA-ZSR, which begin from it.
    """

    def __init__(self, model: ZeroShotModel, prompts: Sequence[str], eps: float, step_size: float, steps: int, lr: float = 1e-4) -> None:
        self.model = copy.deepcopy(model).requires_grad_(True).train()
        self.prompts, self.eps, self.step_size, self.steps = list(prompts), eps, step_size, steps
        self.optimizer = torch.optim.SGD(self.model.visual.parameters(), lr=lr, momentum=0.9)

    def loss(self, images_BCHW: Tensor, tokens_KT: Tensor, labels_B: Tensor) -> Tensor:
        """Cross-entropy, both towers run."""
        clip = self.model.clip
        image_BD = F.normalize(self.model.visual(self.model.pixels(images_BCHW)), dim=-1)
        text_KD = F.normalize(clip.encode_text(tokens_KT), dim=-1)  # type: ignore[operator]
        return F.cross_entropy(self.model.logit_scale * image_BD @ text_KD.T, labels_B)

    def attack(self, images_BCHW: Tensor, tokens_KT: Tensor, labels_B: Tensor, start_BCHW: Tensor) -> Tensor:
        """PGD; each step's gradient goes into the weights, too."""
        point_BCHW = start_BCHW
        for _ in range(self.steps):
            point_BCHW = point_BCHW.detach().requires_grad_(True)
            self.loss(point_BCHW, tokens_KT, labels_B).backward()
            assert point_BCHW.grad is not None
            point_BCHW = uphill(point_BCHW.detach(), point_BCHW.grad, images_BCHW, self.eps, self.step_size)
        return point_BCHW

    def step(self, batch: Batch, start_BCHW: Tensor | None = None) -> Tensor:
        """A training step; gives the loss that it went down."""
        assert batch.labels is not None
        start_BCHW = start_in_ball(batch.images, self.eps) if start_BCHW is None else start_BCHW
        tokens_KT = self.model.tokenizer(self.prompts).to(batch.images.device)
        adversarial_BCHW = self.attack(batch.images, tokens_KT, batch.labels, start_BCHW)
        self.model.zero_grad(set_to_none=True)
        loss = self.loss(adversarial_BCHW, tokens_KT, batch.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class ExtraPass:
    """The FARE lineage: squared L2 to the frozen original, with a clean student pass that is not used, and waits at each attack step.

    The attack takes gradients by the image alone, with weights that keep theirs on (more is held for backward); four checks a step ask the
    device for an answer. No autocast.

    Args:
        model: copied twice, as student and as teacher.
        eps, step_size: of the attack, in units of the pixel range.
        steps: k.
        lr: of AdamW.

    Reference:
        Schlarmann et al., arXiv 2402.12336, as released (chs20/RobustVLM).
    """

    def __init__(self, model: ZeroShotModel, eps: float, step_size: float, steps: int, lr: float = 1e-5) -> None:
        self.model = copy.deepcopy(model).eval()
        self.student: nn.Module = self.model.visual.requires_grad_(True)
        self.teacher = copy.deepcopy(model.visual).requires_grad_(False).eval()
        self.eps, self.step_size, self.steps = eps, step_size, steps
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=lr, weight_decay=1e-4)

    def distance(self, images_BCHW: Tensor, target_BD: Tensor) -> Tensor:
        """``mean ||f(x) - target||^2``."""
        squares_BD = (self.student(self.model.pixels(images_BCHW)) - target_BD).square()
        mean: Tensor = squares_BD.sum(1).mean()
        return mean

    def attack(self, images_BCHW: Tensor, target_BD: Tensor, start_BCHW: Tensor) -> Tensor:
        """PGD, checked at each step."""
        point_BCHW = start_BCHW
        for _ in range(self.steps):
            point_BCHW = point_BCHW.detach().requires_grad_(True)
            (gradient_BCHW,) = torch.autograd.grad(self.distance(point_BCHW, target_BD), point_BCHW)
            if gradient_BCHW.isnan().any():
                gradient_BCHW = gradient_BCHW.nan_to_num(0)
            point_BCHW = uphill(point_BCHW.detach(), gradient_BCHW, images_BCHW, self.eps, self.step_size)
            assert not point_BCHW.isnan().any()
            assert (point_BCHW - images_BCHW).abs().max() <= self.eps + 1e-5
            assert point_BCHW.min() >= 0 and point_BCHW.max() <= 1
        return point_BCHW

    def step(self, batch: Batch, start_BCHW: Tensor | None = None) -> Tensor:
        """A training step; gives the loss that it went down."""
        start_BCHW = start_in_ball(batch.images, self.eps) if start_BCHW is None else start_BCHW
        with torch.no_grad():
            target_BD = self.teacher(self.model.pixels(batch.images))
        self.student.eval()
        adversarial_BCHW = self.attack(batch.images, target_BD, start_BCHW)
        self.student.train()
        unused_BD = self.student(self.model.pixels(batch.images))  # with its graph, which nothing goes through
        loss = self.distance(adversarial_BCHW, target_BD)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        del unused_BD
        return loss.detach()
