"""A model in stages: what a test-time defence does to pixels and to the embedding, declared so that attacks can read it.

A plain model has no stages. ``encode_in_stages`` is the one forward that is built from them: pixels stage, image tower, embedding stage.

Shapes: n images, C channels, H height, W width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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


def encode_in_stages(
    model: Staged, images_nCHW: Tensor, draw: Draw | None = None, bpda: Collection[str] = (), gate_temperature: float | None = None,
    hard_forward: bool = False,
) -> Encoding:  # fmt: skip
    """Embeds images through a model's stages; for a plain model just ``model.encode(images)``.

    Args:
        model: with its stages.
        images_nCHW: in [0, 1].
        draw: the random numbers; needed by a random stage alone.
        bpda, gate_temperature, hard_forward: what an attack puts in the place of a stage, see :func:`as_attacked`; nothing by default.

    Raises:
        ConfigError: ``bpda`` names a stage that there is not, or a temperature that is not positive.
        InputError: a random stage without a draw.
    """
    stages = as_attacked(model.stages, bpda, gate_temperature, hard_forward)
    if stages.random and draw is None:
        raise InputError("this model's defence is random and got no draw: give one of aft.clip.stages.draws_for(purpose, keys).")
    shown_nCHW = images_nCHW if stages.pixels is None else act(stages.pixels, images_nCHW, draw)
    encoding = model.undefended.encode(shown_nCHW)
    if stages.embedding is None:
        return encoding
    return replace(encoding, embedding_BD=act(stages.embedding, encoding.embedding_BD, shown_nCHW, draw), tokens_BND=None)


def act(stage: Stage, value: Tensor, *beside: Any) -> Tensor:
    """What a stage makes of ``value``: its ``run`` where the gate is open, its ``otherwise`` (or ``value`` itself) elsewhere.

    Args:
        stage: what acts.
        value: images, or embeddings.
        beside: the further arguments of ``run``, the draw last.
    """
    if stage.gate is None:
        return stage.run(value, *beside)
    return _where_open(stage, _gate_of(stage, value, beside).open_n, value, beside)


def _where_open(stage: Stage, open_n: Tensor, value: Tensor, beside: tuple[Any, ...]) -> Tensor:
    """``run`` on the images whose gate is open, alone unless the stage looks at neighbours; ``otherwise`` on the others."""
    if stage.batch_coupled or in_a_graph():
        return torch.where(_per_row(open_n, value), stage.run(value, *beside), shut(stage, value, *beside))
    return _on_rows(stage.run, open_n, shut(stage, value, *beside), value, beside)


def _on_rows(run: Callable[..., Tensor], chosen_n: Tensor, left: Tensor, value: Tensor, beside: tuple[Any, ...]) -> Tensor:
    """What ``run`` makes of the images where ``chosen_n``, and ``left`` elsewhere; it sees no others."""
    rows = chosen_n.nonzero().flatten()
    if not len(rows):
        return left
    if len(rows) == len(value):
        return run(value, *beside)
    changed = run(value[rows], *(_rows_of(one, rows) for one in beside))
    return left.to(torch.promote_types(left.dtype, changed.dtype)).index_copy(0, rows, changed)


def _rows_of(beside: Any, rows: Tensor) -> Any:
    """The same of some images: of images or of a draw; what is neither as it is."""
    if isinstance(beside, Draw):
        return replace(beside, keys_n=beside.keys_n[rows])
    return beside[rows] if isinstance(beside, Tensor) else beside


def in_a_graph() -> bool:
    """Whether operations are being recorded, so that no branch may depend on values."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call, attr-defined]


def shut(stage: Stage, value: Tensor, *beside: Any) -> Tensor:
    """What a stage makes of ``value`` where its gate is shut."""
    return value if stage.otherwise is None else stage.otherwise(value, *beside)


def as_attacked(
    stages: Stages, bpda: Collection[str] = (), gate_temperature: float | None = None, hard_forward: bool = False
) -> Stages:
    """The stages as an attack differentiates them; by default as they are.

    Args:
        stages: of the model.
        bpda: names of stages whose backward is replaced by the identity, so that a gradient passes where there is none
            (Backward Pass Differentiable Approximation); the forward stays exactly the same.
        gate_temperature: T; where it is given, the other stages run in their ``smooth`` form, and a gate mixes what is done where it is
            open and where it is shut, with the weight ``sigmoid((statistic - threshold) / (T |threshold|))`` (``T`` for a threshold of 0).
        hard_forward: with a temperature, the forward is that of the stages as they are, bit for bit, and only the backward is smooth.

    Raises:
        ConfigError: ``bpda`` names a stage that there is not, or a temperature that is not positive.

    Reference:
        Athalye et al., arXiv 1802.00420 (BPDA).
    """
    for name in bpda:
        if name not in stages.declared:
            raise ConfigError(unknown_name("stage", name, stages.declared))
    if gate_temperature is not None and not gate_temperature > 0:
        raise ConfigError(f"gate_temperature = {gate_temperature}: give a number above 0, such as 0.1, or none for the hard gate.")

    def altered(name: str, stage: Stage) -> Stage:
        """One stage; what remains of its gate is inside ``run``."""
        if name not in bpda and stage.gate is None and stage.smooth is None:
            return stage  # it is its own smooth form, the forward its own hard one
        bare = replace(stage, gate=None, smooth=None, otherwise=None)
        if name in bpda:
            return replace(bare, run=lambda value, *beside: _with_backward_of(value, stage, value, beside))
        if gate_temperature is None:
            return stage

        def run(value: Tensor, *beside: Any) -> Tensor:
            """Smooth, at least backward."""
            gate = None if stage.gate is None else _gate_of(stage, value, beside)
            soft = _softly(stage, gate, gate_temperature, value, beside)
            return _with_backward_of(soft, stage, value, beside, gate) if hard_forward else soft

        return replace(bare, run=run)

    return Stages(**{name: altered(name, stage) for name, stage in stages.declared.items()})


def _softly(stage: Stage, gate: Gate | None, temperature: float, value: Tensor, beside: tuple[Any, ...]) -> Tensor:
    """``w smooth + (1 - w) otherwise``; the smooth form is not run where ``w`` and its slope ``w / (T |t|)`` vanish beside 1, unless
    ``otherwise`` has no slope there beside which they could."""
    smooth = stage.smooth or stage.run
    if gate is None:
        return smooth(value, *beside)
    softness = temperature * (abs(gate.threshold) or 1.0)
    weight_n, left = torch.sigmoid((gate.statistic_n - gate.threshold) / softness), shut(stage, value, *beside)
    wanted_n = (1 - weight_n.detach() / min(softness, 1.0) < 1) | ~_moves(left, value)

    def mixed(value: Tensor, weight_n: Tensor, left: Tensor, *beside: Any) -> Tensor:
        """Of some images."""
        weight = _per_row(weight_n, value)
        return weight * smooth(value, *beside) + (1 - weight) * left

    together = stage.batch_coupled or in_a_graph()
    return _on_rows(mixed, torch.ones_like(wanted_n) if together else wanted_n, left, value, (weight_n, left, *beside))


def _moves(left: Tensor, value: Tensor) -> Tensor:
    """Whether what is done where a gate is shut moves with the image, bool ``[n]``; where nobody differentiates it makes no difference."""
    yes_n = torch.ones(len(value), dtype=torch.bool, device=value.device)
    if left is value or not (torch.is_grad_enabled() and value.requires_grad):
        return yes_n
    slope = torch.autograd.grad(left.sum(), value, retain_graph=True, allow_unused=True)[0] if left.requires_grad else None
    return ~yes_n if slope is None else slope.flatten(1).any(1)


def _gate_of(stage: Stage, value: Tensor, beside: tuple[Any, ...]) -> Gate:
    """The gate on the images that the stage sees: those beside the embeddings, or ``value`` where it is the images."""
    assert stage.gate is not None
    return stage.gate(beside[0] if len(beside) > 1 else value, beside[-1])


def _per_row(row_n: Tensor, value: Tensor) -> Tensor:
    return row_n.view(-1, *[1] * (value.ndim - 1)).to(value.dtype if row_n.is_floating_point() else row_n.dtype)


def _with_backward_of(stand_in: Tensor, stage: Stage, value: Tensor, beside: tuple[Any, ...], gate: Gate | None = None) -> Tensor:
    """What the stage gives, with the gradient of ``stand_in``; its gate is not asked again where it is known."""
    with torch.no_grad():
        changed = act(stage, value, *beside) if gate is None else _where_open(stage, gate.open_n, value, beside)
    given: Tensor = _BackwardOf.apply(stand_in, changed)
    return given


class _BackwardOf(torch.autograd.Function):
    """``changed`` forward, ``stand_in`` backward."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, changed: Tensor) -> Tensor:
        """What the stage gave, bit for bit."""
        return changed.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """To what stands in."""
        return gradient, None
