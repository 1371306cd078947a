"""Loss terms: small dataclasses over pure losses, the registry that names them, and their weights over time."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from torch import Tensor

from aft.errors import ConfigError, unknown_name
from aft.losses import alignment, caption_contrast
from aft.methods.distributed import gather_with_gradient
from aft.methods.targets import Targets
from aft.methods.views import Views

#: What a term may need: it decides whether a teacher is built and is checked when a run is set up.
NEEDS = frozenset({"labels", "captions", "descriptions", "tokens", "teacher_clean", "teacher_adversarial", "student_clean", "clean"})

#: Types of settings that are checked by their annotation, and what errors call them.
PLAIN: dict[Any, str] = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a name", type(None): "null"}


@dataclass(frozen=True)
class Ramp:
    """A weight that goes in a straight line from ``start`` to ``end`` over the first ``steps`` optimiser steps, then stays."""

    start: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        """The weight at an optimiser step."""
        return self.start + (self.end - self.start) * min(1.0, step / max(1, self.steps))


Weight = float | Ramp


@dataclass(eq=False)
class Term:
    """One summand of a method's loss.

    Subclasses add typed settings, say what they ``need``, and compute a scalar from targets and views.
    ``couples_batch`` says of a loss that samples see each other, so that the global batch defines it.
    A term with parameters is an ``nn.Module`` too: they are in DDP and in the checkpoint, and in the method's optimiser unless
    ``steps_itself``; then ``after_step`` moves them. ``figures`` holds what it wants logged of its last call.
    """

    weight: Weight = 1.0
    needs: ClassVar[frozenset[str]] = frozenset()
    couples_batch: ClassVar[bool] = False
    steps_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.weight, Mapping):
            known = [field.name for field in dataclasses.fields(Ramp)]
            if set(self.weight) != set(known):
                raise ConfigError(f"weight = {self.weight}: a ramp has exactly the keys {', '.join(known)}.")
            self.weight = Ramp(**self.weight)
        numbers = (self.weight.start, self.weight.end, self.weight.steps) if isinstance(self.weight, Ramp) else (self.weight,)
        if not all(isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number) for number in numbers):
            raise ConfigError(f"weight = {self.weight} is not a finite number: write a number, or a ramp with start, end and steps.")
        if min(numbers) < 0:
            raise ConfigError(f"weight = {self.weight} is negative: a term is made smaller; give 0 or more.")
        self.figures: dict[str, Tensor] = {}
        if not self.needs <= NEEDS:
            raise ConfigError(unknown_name(f"need of {type(self).__name__}", min(self.needs - NEEDS), NEEDS))

    def weight_at(self, step: int) -> float:
        """The factor at an optimiser step."""
        return self.weight.at(step) if isinstance(self.weight, Ramp) else float(self.weight)

    def prepare(self, width: int, seed: int) -> None:
        """Makes what depends on the embedding's width, before the optimiser is built."""

    def after_step(self, step: int) -> None:
        """Called after each optimiser step, ``step`` of which are done."""

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """The unweighted scalar loss."""
        raise NotImplementedError


@dataclass(eq=False)
class Alignment(Term):
    """Cross-entropy of the adversarial image (or of the clean one) to its class text (TeCoA, arXiv 2212.07016)."""

    bank: str = "class"
    image: Literal["adversarial", "clean"] = "adversarial"
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("image", self.image, ("adversarial", "clean"))

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``alignment(logits(image), labels)``."""
        encoding = views.clean if self.image == "clean" else views.adversarial
        return alignment(views.logits(encoding, self.bank), targets.labels)


def one_of(name: str, given: object, allowed: Iterable[str]) -> None:
    """Raises ConfigError for a setting that is none of the values allowed, with near matches."""
    if given not in tuple(allowed):
        raise ConfigError(unknown_name(name, str(given), allowed))


@dataclass(eq=False)
class CaptionContrast(Term):
    """InfoNCE between images and captions, both ways, over the global batch (CLIP, arXiv 2103.00020)."""

    needs: ClassVar[frozenset[str]] = frozenset({"captions"})
    couples_batch: ClassVar[bool] = True

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``caption_contrast(logits(images, captions), truth)`` with images of all ranks."""
        truth_BM = targets.caption_truth_BM
        everywhere = dataclasses.replace(views.adversarial, embedding_BD=gather_with_gradient(views.adversarial.embedding_BD))
        return caption_contrast(views.logits(everywhere, "captions"), gather_with_gradient(truth_BM.float()) > 0.5)


_REGISTRY: dict[str, type[Term]] = {"alignment": Alignment, "caption_contrast": CaptionContrast}


def register_term(name: str, term: type[Term]) -> None:
    """Names a term for YAML files. Call it at import.

    Raises:
        ConfigError: the name is taken by another class, or the term needs something unknown.
    """
    if _REGISTRY.get(name, term) is not term:
        raise ConfigError(f"term name {name!r} is taken by {_REGISTRY[name].__qualname__}: choose another.")
    if not term.needs <= NEEDS:
        raise ConfigError(unknown_name(f"need of term {name!r}", min(term.needs - NEEDS), NEEDS))
    _REGISTRY[name] = term


def find_term(name: str) -> type[Term]:
    """The term class of a registered name or a dotted path.

    Raises:
        ConfigError: no such term; near matches are listed.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute) if module else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, Term)):
        raise ConfigError(unknown_name("term", name, _REGISTRY))
    return found


def build_terms(defaults: Mapping[str, Term], overrides: Mapping[str, Mapping[str, Any] | None] | None) -> dict[str, Term]:
    """A method's terms with a user's settings laid over them; a term set to none is taken out.

    Raises:
        ConfigError: an unknown term or setting, or no term left.
    """
    terms = copy.deepcopy(dict(defaults))
    for name, settings in (overrides or {}).items():
        if settings is None:
            if name not in terms:
                raise ConfigError(unknown_name("term to take out", name, terms))
            del terms[name]
            continue
        if not isinstance(settings, Mapping):
            raise ConfigError(f"terms.{name} = {settings!r}: give settings such as {{weight: 0.5}}, or null to take the term out.")
        kind = type(terms[name]) if name in terms else find_term(name)
        known, hints = [f.name for f in dataclasses.fields(kind)], _hints(kind)
        for key, given in settings.items():
            if key not in known:
                raise ConfigError(unknown_name(f"setting of term {name!r}", key, known))
            _check_type(f"terms.{name}.{key}", given, hints.get(key))
        try:
            terms[name] = dataclasses.replace(terms[name], **settings) if name in terms else kind(**settings)
        except ConfigError as error:
            raise ConfigError(f"terms.{name}: {error}") from None
    if not terms:
        raise ConfigError("no loss term is left: a method needs at least one.")
    return terms


def _hints(kind: type[Term]) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # a type that a module imports for type checkers alone
        return {}


def _check_type(name: str, given: object, hint: object) -> None:
    """Raises ConfigError for a setting of another plain type: a word where a number is asked would fail later, or count as true."""
    allowed = get_args(hint) or (hint,)
    if not set(allowed) <= set(PLAIN):
        return
    fits = [isinstance(given, (int, float) if kind is float else kind) and isinstance(given, bool) == (kind is bool) for kind in allowed]
    if not any(fits) or (isinstance(given, float) and not math.isfinite(given)):
        raise ConfigError(f"{name} = {given!r}: give {' or '.join(PLAIN[kind] for kind in allowed)}.")


def all_needs(terms: Iterable[Term]) -> frozenset[str]:
    """The union of what terms need."""
    return frozenset().union(*(term.needs for term in terms))
