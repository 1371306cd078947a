"""What a ViT image tower costs in floating-point operations, as a function of its configuration.

Two operations a multiply-add. T tokens, D width, p patch size, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TowerCost:
    """Cost of one image.

    Args:
        forward: F, operations of a forward pass.
        attention_share: ``a``, share of F in the two attention products (both of their operands have gradients).
        patch_share: ``p``, share of F in the patch embedding (its input needs no gradient when weights are trained).
    """

    forward: float
    attention_share: float
    patch_share: float

    @property
    def input_gradient(self) -> float:
        """Backward to the pixels alone, weights frozen: ``(1 + a) F``."""
        return (1 + self.attention_share) * self.forward

    @property
    def weight_gradient(self) -> float:
        """Backward to the weights, pixels without gradient: ``(2 - p) F``."""
        return (2 - self.patch_share) * self.forward

    def fine_tuning_step(self, attack_steps: int, trained: int = 1, frozen: int = 0) -> float:
        """A step of adversarial fine-tuning: ``k (F + (1 + a) F) + trained (F + (2 - p) F) + frozen F``.

        Args:
            attack_steps: k, gradient steps of the attack.
            trained: forwards whose weights get a gradient: the adversarial view, and the clean one where a term asks for it.
            frozen: forwards without one: the teacher's, the student's own as a constant.
        """
        attack = attack_steps * (self.forward + self.input_gradient)
        return attack + trained * (self.forward + self.weight_gradient) + frozen * self.forward


def vit_cost(config: Mapping[str, Any], side: int | None = None, kept: int | None = None) -> TowerCost:
    """The cost of open_clip's VisionTransformer with this model configuration.

    Args:
        config: open_clip's model configuration.
        side: of the images, pixels; none: the tower's own.
        kept: patches that go through the blocks (all are embedded before some are dropped); none: all.

    Example:
        >>> import open_clip
        >>> cost = vit_cost(open_clip.get_model_config("ViT-B-32"))
        >>> round(cost.forward / 1e9, 2), round(cost.attention_share, 3), round(cost.patch_share, 3)
        (8.82, 0.01, 0.026)
    """
    vision = config["vision_cfg"]
    width, patches = vision["width"], ((side or vision["image_size"]) // vision["patch_size"]) ** 2
    tokens = (patches if kept is None else kept) + 1
    attention = vision["layers"] * 4 * tokens**2 * width
    linear = vision["layers"] * 2 * tokens * width**2 * (4 + 2 * vision.get("mlp_ratio", 4.0))
    patch = 2 * patches * 3 * vision["patch_size"] ** 2 * width
    forward = attention + linear + patch + 2 * width * config["embed_dim"]
    return TowerCost(forward, attention / forward, patch / forward)


def text_forward(config: Mapping[str, Any]) -> float:
    """Operations of one forward of open_clip's text transformer for one prompt of full length.

    Example:
        >>> import open_clip
        >>> config = open_clip.get_model_config("ViT-B-16")
        >>> round(text_forward(config) / vit_cost(config).forward, 3)
        0.17
    """
    text = config["text_cfg"]
    width, tokens = text["width"], text.get("context_length", 77)
    block: float = 4 * tokens**2 * width + 24 * tokens * width**2
    return float(text["layers"] * block + 2 * width * config["embed_dim"])
