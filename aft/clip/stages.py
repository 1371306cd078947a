"""A model in stages: what a test-time defence does to pixels and to the embedding, declared so that attacks can read it.

A plain model has no stages. ``encode_in_stages`` is the one forward that is built from them: pixels stage, image tower, embedding stage.

Shapes: n images, C channels, H height, W width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from aft.errors import ConfigError, InputError, unknown_name

if TYPE_CHECKING:
    from aft.clip.model import Encoding, ZeroShotModel

Purpose = Literal["scoring", "selection", "attack"]
PURPOSES: tuple[Purpose, ...] = ("scoring", "selection", "attack")
#: Numbers of draws that each purpose has, so that no attack sees the random numbers that it is judged by. Those below the first purpose's
#: are the attacks' own (starts, windows), which are made from the same keys.
DRAWS_A_PURPOSE = 1 << 32
#: Numbers of counted noise that one draw has, for a defence that needs several.
USES_A_DRAW = 1 << 12
NAMES = ("pixels", "embedding")


@dataclass(frozen=True, eq=False)
class Draw:
    """The random numbers of one forward pass, as counted noise: a function of the sample and of this number.

    Args:
        keys_n: the samples' keys, int64 ``[n]``.
        number: which draw.
    """

    keys_n: Tensor
    number: int = 0

    def count(self, use: int = 0) -> int:
        """The number to hand to counted noise for the ``use``-th need of this draw.

        Raises:
            ConfigError: more needs than one draw has numbers.
        """
        if not 0 <= use < USES_A_DRAW:
            raise ConfigError(f"use = {use} of a draw: there are 0 to {USES_A_DRAW - 1}; take another draw.")
        return self.number * USES_A_DRAW + use


def draws_for(purpose: Purpose, keys_n: Tensor, count: int = 1, first: int = 0) -> list[Draw]:
    """``count`` draws for a purpose; those of two purposes never meet.

    Args:
        purpose: ``scoring`` (the verdict), ``selection`` (which of an attack's points is kept) or ``attack`` (its gradients).
        keys_n: the samples' keys.
        count: how many.
        first: where to begin, such as at a step's own draws.

    Raises:
        ConfigError: an unknown purpose, or numbers outside its range.
    """
    if purpose not in PURPOSES:
        raise ConfigError(unknown_name("purpose", str(purpose), PURPOSES))
    if first < 0 or count < 1 or first + count > DRAWS_A_PURPOSE:
        raise ConfigError(f"draws {first} to {first + count - 1}: give one or more, from 0 and below {DRAWS_A_PURPOSE}.")
    start = (1 + PURPOSES.index(purpose)) * DRAWS_A_PURPOSE + first
    return [Draw(keys_n, start + i) for i in range(count)]


class Gate(NamedTuple):
    """When a stage acts: on the images whose ``statistic_n`` is above the ``threshold``."""

    statistic_n: Tensor
    threshold: float

    @property
    def open_n(self) -> Tensor:
        """Where it acts, bool ``[n]``."""
        return self.statistic_n > self.threshold


@dataclass(frozen=True)
class Stage:
    """One step of a defence.

    Args:
        run: what it does where it acts. In ``pixels``: ``run(x_nCHW, draw)``, images in [0, 1] to such images; in ``embedding``:
            ``run(z_nD, x_nCHW, draw)``, raw embeddings to such embeddings, beside the images that were embedded.
            A stage that needs gradients enables them itself.
        differentiable: its own derivative says how its output moves; else attack it with the identity in its place (BPDA).
        random: it reads ``draw``.
        batch_coupled: an image's result depends on its neighbours.
        gate: ``gate(x_nCHW, draw)``, when it acts; none: always.
        smooth: the same arguments as ``run``, a form that can be differentiated: inner gradients keep their graph, ``sign(g)`` is
            ``tanh(g / c)`` with ``c`` the sample's mean ``|g|``; none: ``run`` itself is such.
        otherwise: the same arguments, what it does where its gate is shut; none: nothing.
    """

    run: Callable[..., Tensor]
    differentiable: bool = True
    random: bool = False
    batch_coupled: bool = False
    gate: Callable[[Tensor, Draw | None], Gate] | None = None
    smooth: Callable[..., Tensor] | None = None
    otherwise: Callable[..., Tensor] | None = None

    @property
    def gated(self) -> bool:
        """Whether it may leave an image as it is."""
        return self.gate is not None


@dataclass(frozen=True)
class Stages:
    """All that a defence does; a plain model's are empty."""

    pixels: Stage | None = None
    embedding: Stage | None = None

    @property
    def declared(self) -> dict[str, Stage]:
        """Those there are, by name, in the order in which they run."""
        return {name: stage for name in NAMES if (stage := getattr(self, name)) is not None}

    @property
    def random(self) -> bool:
        """Whether two draws can differ."""
        return any(stage.random for stage in self.declared.values())


class Staged(Protocol):
    """A model that declares its stages: ``undefended`` is the model between them (itself, where there are none)."""

    @property
    def stages(self) -> Stages:
        """What surrounds the image tower."""

    @property
    def undefended(self) -> ZeroShotModel:
        """The same weights without any stage."""


def encode_in_stages(model: Staged, images_nCHW: Tensor, draw: Draw | None = None, bpda: Collection[str] = ()) -> Encoding:
    """Embeds images through a model's stages; for a plain model just ``model.encode(images)``.

    Args:
        model: with its stages.
        images_nCHW: in [0, 1].
        draw: the random numbers; needed by a random stage alone.
        bpda: names of stages whose backward is replaced by the identity, so that a gradient passes where there is none
            (Backward Pass Differentiable Approximation); the forward stays exactly the same.

    Raises:
        ConfigError: ``bpda`` names a stage that there is not.
        InputError: a random stage without a draw.

    Reference:
        Athalye et al., arXiv 1802.00420 (BPDA).
    """
    stages = model.stages
    for name in bpda:
        if name not in stages.declared:
            raise ConfigError(unknown_name("stage", name, stages.declared))
    if stages.random and draw is None:
        raise InputError("this model's defence is random and got no draw: give one of aft.clip.stages.draws_for(purpose, keys).")
    shown_nCHW = _through(stages.pixels, images_nCHW, images_nCHW, (draw,), "pixels" in bpda)
    encoding = model.undefended.encode(shown_nCHW)
    if stages.embedding is None:
        return encoding
    changed_nD = _through(stages.embedding, encoding.embedding_BD, shown_nCHW, (shown_nCHW, draw), "embedding" in bpda)
    return replace(encoding, embedding_BD=changed_nD, tokens_BND=None)


def _through(stage: Stage | None, value: Tensor, images_nCHW: Tensor, beside: tuple[Any, ...], identity: bool) -> Tensor:
    """One stage where its gate is open, and what stands in for it where it is shut."""
    if stage is None:
        return value
    with torch.no_grad() if identity else nullcontext():
        changed = stage.run(value, *beside)
        if stage.gate is not None:
            open_n = stage.gate(images_nCHW, beside[-1]).open_n
            shut = value if stage.otherwise is None else stage.otherwise(value, *beside)
            changed = torch.where(open_n.view(-1, *[1] * (value.ndim - 1)), changed, shut)
    return _IdentityBackward.apply(value, changed) if identity else changed


class _IdentityBackward(torch.autograd.Function):
    """``changed`` forward, the identity in ``value`` backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, changed: Tensor) -> Tensor:
        """What the stage gave, bit for bit."""
        return changed.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """As if the stage had not been there."""
        return gradient, None
