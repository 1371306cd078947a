"""What every test-time defence shares: it wraps a model, is one, and declares its stages.

Shapes: n images, C channels, H height, W width, D embedding width, K classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aft.attacks.threat_model import pixel_fraction
from aft.clip.model import Encoding, ZeroShotModel, at_least_fp32
from aft.clip.stages import Draw, Stages, encode_in_stages
from aft.errors import ConfigError


class Defended(ZeroShotModel, ABC):
    """A model behind a defence: the same weights, texts and record, and ``stages`` around the image tower.

    It shares every part with the model that it wraps and changes none: weights, modes, ``.grad``, ``requires_grad`` and random streams are
    as before. A random defence needs a draw with each look: ``encode(images, draw=...)``, or :func:`aft.clip.stages.encode_in_stages`.

    Args:
        model: a plain model.
        **settings: the defence's own, as plain values; they stand on cards.

    Raises:
        ConfigError: the model is defended already.
    """

    #: Id on cards.
    name: ClassVar[str]

    def __init__(self, model: ZeroShotModel, **settings: Any) -> None:
        if model.defense is not None:
            raise ConfigError(f"the model is defended already, by {model.defense['name']}: give its .undefended to {self.name}.")
        super().__init__(model.clip, model.tokenizer, model.record, model.text_transform)
        self.plain = model
        self.settings = settings
        self.training = model.training

    @property
    @abstractmethod
    def stages(self) -> Stages:
        """What it does to pixels and to the embedding."""

    @property
    def undefended(self) -> ZeroShotModel:
        """The model that it wraps."""
        return self.plain

    @property
    def defense(self) -> dict[str, Any]:
        """Name and settings, for cards."""
        return {"name": self.name, "settings": dict(self.settings)}

    def encode(self, images_BCHW: Tensor, tokens: bool = False, draw: Draw | None = None) -> Encoding:
        """Embeds images through the stages.

        Args:
            images_BCHW: in [0, 1], any size.
            tokens: not to be had of a defended model.
            draw: the random numbers of this look; needed by a random defence.

        Raises:
            ConfigError: tokens are asked for.
            InputError: a random defence without a draw.
        """
        if tokens:
            raise ConfigError(f"a model behind {self.name} gives no patch tokens: ask its .undefended for them.")
        return encode_in_stages(self, images_BCHW, draw)

    def forward(self, images_BCHW: Tensor, text_KD: Tensor, draw: Draw | None = None) -> Tensor:
        """Logits of images in [0, 1] over a text bank, ``[B, K]``; see :meth:`encode` for the draw."""
        return self.logits(self.encode(images_BCHW, draw=draw), text_KD)

    def resize(self, images_BCHW: Tensor) -> Tensor:
        """The wrapped model's."""
        return self.plain.resize(images_BCHW)

    def pixels(self, images_BCHW: Tensor) -> Tensor:
        """The wrapped model's."""
        return self.plain.pixels(images_BCHW)

    def raw_bank(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The wrapped model's, so that a list of texts is encoded once for both."""
        return self.plain.raw_bank(names, templates)


@contextmanager
def own_gradients() -> Iterator[None]:
    """Gradients enabled, whatever a caller's ``no_grad`` or ``inference_mode`` says."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def as_leaf(value: Tensor) -> Tensor:
    """A copy without a graph that a gradient can be taken by; to be made inside :func:`own_gradients`."""
    return value.detach().clone().requires_grad_()


def embed(model: ZeroShotModel, images_nCHW: Tensor) -> Tensor:
    """Raw embeddings ``[n, D]`` in fp32 or wider, with a graph to the images where there is one.

    Always by the kernels of a pass with gradient (torch has faster ones without, which round otherwise): a defence gives the same bits
    whether or not somebody differentiates it.
    """
    graph = torch.is_grad_enabled() and images_nCHW.requires_grad
    with own_gradients():
        z_nD = at_least_fp32(model.encode(images_nCHW if graph else as_leaf(images_nCHW)).embedding_BD)
    return z_nD if graph else z_nD.detach()


def gradient_at(loss: Callable[[Tensor], Tensor], point_nCHW: Tensor, keep_graph: bool = False) -> Tensor:
    """The gradient by ``point`` of a loss that has one value a sample, whatever mode the caller is in.

    Args:
        loss: maps ``[n, C, H, W]`` to ``[n]``.
        point_nCHW: where.
        keep_graph: the gradient can itself be differentiated, where ``point`` has a graph. Attention then runs as plain matrix products,
            the one form that has second derivatives.
    """
    twice = keep_graph and point_nCHW.requires_grad and torch.is_grad_enabled()
    with own_gradients(), twice_differentiable() if twice else nullcontext():
        at_nCHW = point_nCHW if twice else as_leaf(point_nCHW)
        return torch.autograd.grad(loss(at_nCHW).sum(), at_nCHW, create_graph=twice)[0]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by plain matrix products."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def softened_sign(gradient_nCHW: Tensor) -> Tensor:
    """``tanh(g / c)`` with ``c`` the sample's mean ``|g|``: what stands for ``sign(g)`` where it must have a slope, the true one."""
    size_n = gradient_nCHW.abs().flatten(1).mean(1).clamp_min(torch.finfo(gradient_nCHW.dtype).tiny)
    return torch.tanh(gradient_nCHW / size_n.view(-1, *[1] * (gradient_nCHW.ndim - 1)))


def length(value: float | str, name: str, largest: float = 1.0) -> float:
    """A setting in units of the pixel range, such as ``"4/255"``.

    Raises:
        ConfigError: not a number, negative, or larger than the range.
    """
    number = pixel_fraction(value, name)
    if number > largest:
        raise ConfigError(f"{name} = {value} is outside [0, {largest:g}]: it is in units of the pixel range, so write 4/255 for four grey "
                          "levels.")  # fmt: skip
    return number


def check_gate(threshold: float | None, name: str) -> None:
    """Raises ConfigError where a gate's threshold is no relative drift."""
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise ConfigError(f"{name} = {threshold}: a relative drift is 0 or more, such as 0.2; none takes the gate away.")
