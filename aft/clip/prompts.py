"""From class names to prompts: templates, duplicate names, captions, and the hash that names a text bank."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Sequence

from aft.errors import ConfigError

#: The prompt of OpenAI's single-template zero-shot evaluation.
DEFAULT_TEMPLATES = ("a photo of a {}.",)

#: Prompts for captions in pre-training: short, and none of them made for one data set.
CAPTION_TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a small photo of the {}.",
    "a cropped photo of one {}.",
    "this is a {}.",
    "{}",
)


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Every name in every template: one list of prompts a name.

    Raises:
        ConfigError: no names, no templates, or a template without exactly one ``{}``.

    Example:
        >>> fill_templates(["cat"], ["a photo of a {}.", "the {}"])
        [['a photo of a cat.', 'the cat']]
    """
    if not names:
        raise ConfigError("no class names were given: a zero-shot model needs at least one to classify among.")
    if not templates:
        raise ConfigError("no templates were given: use at least '{}' (the bare class name).")
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"template {template!r} has {template.count('{}')} places for the class name: write exactly one '{{}}'.")
    return [[template.replace("{}", name) for template in templates] for name in names]


def warn_of_duplicates(names: Sequence[str]) -> list[str]:
    """Warns of class names that stand for two classes, since they cap accuracy silently (ImageNet's crane and maillot).

    Returns:
        The names that occur more than once, ignoring case and outer space.
    """
    counts = Counter(name.strip().lower() for name in names)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        warnings.warn(
            f"class names that stand for more than one class: {', '.join(twice)}. Their prompts are equal, so all but one of "
            "these classes can never be predicted; rename them in the class list.",
            stacklevel=2,
        )
    return twice


def text_hash(names: Sequence[str], templates: Sequence[str]) -> str:
    """sha256 of class names and templates, in order: what identifies a text bank beside the weights."""
    return hashlib.sha256(json.dumps([list(names), list(templates)]).encode()).hexdigest()
