"""Every exception of the project, and the one sentence form they share: what came, what is allowed, what to do."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class AftError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(AftError, ValueError):
    """A setting is out of range, unknown, or contradicts another."""


class InputError(AftError, ValueError):
    """A tensor given to the library breaks its contract (range, dtype, NaN, shape)."""


class DataError(AftError, ValueError):
    """A data set is missing, empty, damaged, or disagrees with the weights or the task."""


class WeightsError(AftError, ValueError):
    """Weights are missing, damaged, of an unknown layout, or do not fit the model."""


class RunError(AftError, RuntimeError):
    """A run cannot go on: a foreign run folder, no memory, no such device."""


@contextmanager
def ending_calmly() -> Iterator[None]:
    """Around a program: an error that its user can mend ends it with ``error:`` and one sentence in place of a traceback, and with 1."""
    try:
        yield
    except AftError as error:
        sys.exit(f"error: {error}")


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> str:
    """The message for a name that is not known: the near matches first, then all that is allowed.

    Args:
        kind: what the name should be, such as ``"term"``.
        given: the name that came.
        allowed: the names that exist.

    Returns:
        One sentence to raise as an error.

    Example:
        >>> unknown_name("term", "alignmnt", ["alignment", "smoothness"])
        "unknown term 'alignmnt': did you mean 'alignment'? Known: alignment, smoothness."
    """
    names = sorted(allowed)
    lower = {name.lower(): name for name in names}
    near = [lower[match] for match in get_close_matches(given.lower(), lower, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"unknown {kind} {given!r}: {hint}Known: {', '.join(names)}."
