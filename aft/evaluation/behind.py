"""Models x defences: which models an evaluation measures, and whether the protocols fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aft.clip.model import ZeroShotModel
from aft.defenses import DefenseSpec
from aft.errors import ConfigError
from aft.evaluation.adaptive import DEFENDED

#: A model and its name in tables.
Named = tuple[str, ZeroShotModel]


def crossed(
    models: Sequence[Named], protocols: Sequence[str], one: str | DefenseSpec | None, many: Mapping[str, DefenseSpec] | None
) -> list[Named]:
    """Every model behind every defence, named ``MODEL+DEFENCE``, one defence after the other; the models as they are where there is none.

    Args:
        models: with their names in tables.
        protocols: that they shall be measured by.
        one: id or settings of a defence.
        many: name in tables -> defence, in the place of ``one``.

    Raises:
        ConfigError: ``one`` and ``many``, or protocols that do not fit: a figure of a defence never stands without the undefended one and
            without attacks that know it, so those of plain models are refused.
    """
    if one is not None and many is not None:
        raise ConfigError("defense and defenses each say which defence: give one of them.")
    if many is not None and not many:
        raise ConfigError("defenses is empty: give one or more, such as {ttc: {name: ttc}}, or leave it out.")
    spec = DefenseSpec(one) if isinstance(one, str) else one
    specs = dict(many or ({} if spec is None else {spec.name: spec}))
    for name in protocols:
        if bool(specs) != (name in DEFENDED):
            raise ConfigError(
                f"protocol {name} is for models {'without' if specs else 'behind'} a defence: "
                + (f"take {', '.join(DEFENDED)}, which measure the undefended model beside it." if specs else "give --defense as well.")
            )
    if not specs:
        return list(models)
    return [(f"{label}+{name}", spec.build(model)) for name, spec in specs.items() for label, model in models]
