"""Modules that become those of another class in place: same parameters, same names, another forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def reclass(tower: nn.Module, before: type[nn.Module], after: type[nn.Module], fits: Callable[[Any], bool] = lambda module: True) -> None:
    """Makes each module of exactly the class ``before`` that ``fits`` one of ``after``; neither has attributes that the other lacks."""
    for module in tower.modules():
        if type(module) is before and fits(module):
            module.__class__ = after
