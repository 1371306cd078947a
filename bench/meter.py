"""What training costs and what it brings: counted operations of the steps alone, and accuracies in between."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from aft.attacks import undisturbed
from aft.cards import write_whole
from aft.clip.cost import vit_cost
from aft.methods import AdversarialFineTuning

MARKS = "marks.json"
AT_ONCE = 250  # images of an evaluation


class Meter(L.Callback):
    """Every so many steps a mark: ``{step, images, cost, clean_accuracy, robust_accuracy}``, in ``marks.json``.

    ``cost`` is in forwards of one image through the whole image tower: every forward in a step is counted where it
    happens, with the patches that it had, and the backward pass that follows from what needs a gradient is added by the cost model
    (``aft.clip.cost``). Other towers (a teacher, texts) are not counted. The sums lie in the checkpoint, so that steps which a kill
    cost are not counted twice.

    Args:
        every: steps between two marks.
        target: robust accuracy that ends the run; none: it goes on to its last step.
        least: steps that it makes in any case.
    """

    def __init__(self, every: int = 50, target: float | None = None, least: int = 0) -> None:
        self.every, self.target, self.least = every, target, least
        self.sums = {"cost": 0.0, "images": 0.0}
        self.marks: list[dict[str, float]] = []
        self.counting = False
        self.side, self.pixels_learn = 0, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens to the image tower."""
        assert isinstance(pl_module, AdversarialFineTuning)
        tower = pl_module.model.visual
        assert isinstance(tower, VisionTransformer)
        config = pl_module.model.record.config

        def pixels(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            """What the patch embedding sees."""
            self.side, self.pixels_learn = inputs[0].shape[-1], inputs[0].requires_grad

        def tokens(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            """What the blocks see; the whole cost of this forward and of its backward."""
            if self.counting:
                learns = any(p.requires_grad for p in tower.parameters())
                self.sums["cost"] += len(inputs[0]) * cost_of_a_forward(
                    config, self.side, inputs[0].shape[1] - 1, weights=learns and torch.is_grad_enabled(), pixels=self.pixels_learn
                )

        self.handles = [tower.conv1.register_forward_pre_hook(pixels), tower.transformer.register_forward_pre_hook(tokens)]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listens no more."""
        for handle in getattr(self, "handles", []):
            handle.remove()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self.counting = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step is over; where it is time, a mark, and the end of the run."""
        self.sums["images"] += len(batch.images)
        self.counting = False
        if trainer.global_step % self.every == 0:
            assert isinstance(pl_module, AdversarialFineTuning)
            self.marks.append({"step": float(trainer.global_step), **self.sums, **accuracies(trainer, pl_module)})
            write_whole(Path(trainer.default_root_dir) / MARKS, json.dumps(self.marks, indent=1).encode())
            trainer.should_stop = trainer.should_stop or self.over()

    def over(self) -> bool:
        """Whether the last mark ends the run: the target was reached, by it or earlier, and the least is made."""
        if self.target is None or not self.marks:
            return False
        return self.marks[-1]["step"] >= self.least and any(mark["robust_accuracy"] >= self.target for mark in self.marks)

    def state_dict(self) -> dict[str, Any]:
        """Sums and marks."""
        return {"sums": dict(self.sums), "marks": list(self.marks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with them."""
        self.sums, self.marks = dict(state_dict["sums"]), list(state_dict["marks"])


def cost_of_a_forward(config: Mapping[str, Any], side: int, kept: int, *, weights: bool, pixels: bool) -> float:
    """A forward with its backward, for one image, in forwards of the whole tower.

    ``F``, and ``(2 - p) F`` where weights learn, ``(1 + a) F`` for the pixels alone, ``2 F`` for both.

    Args:
        config: open_clip's model configuration.
        side: of the images, pixels.
        kept: patches that the blocks see.
        weights, pixels: what needs a gradient.
    """
    cost = vit_cost(config, side, kept)
    backward = 2 * cost.forward if weights and pixels else cost.weight_gradient if weights else cost.input_gradient if pixels else 0.0
    return (cost.forward + backward) / vit_cost(config).forward


def accuracies(trainer: L.Trainer, module: AdversarialFineTuning) -> dict[str, float]:
    """Clean and robust accuracy on the held-out training images, as validation counts them."""
    held = trainer.datamodule.evaluation_set("holdout")  # type: ignore[attr-defined]
    device = next(module.parameters()).device
    with undisturbed((module.model,)), torch.no_grad():
        for rows in torch.arange(len(held)).split(AT_ONCE):
            module.validation_step(module.transfer_batch_to_device(held.batch(rows.tolist()), device, 0), 0)
    found = {}
    for name, metrics in (("clean_accuracy", module.val_clean), ("robust_accuracy", module.val_robust)):
        metric: Any = metrics[0]
        found[name] = float(metric.compute())
        metric.reset()
    return found
