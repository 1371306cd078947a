"""Which images a figure is measured on: subsets of one data set nest, so figures on 200 and on 1,000 images share the first 200.

Shapes: N images of a data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from aft.batch import EvaluationSet
from aft.errors import DataError

SELECTION_SEED = 0


def nested_order(labels_N: Tensor, seed: int = SELECTION_SEED) -> Tensor:
    """The one order of a data set: one image of each class in turn, each class shuffled by (seed, class).

    The first n of it are balanced to within one image a class, for every n up to the size of the smallest class times K.

    Args:
        labels_N: ``int64 [N]``.
        seed: of the shuffles.

    Returns:
        ``int64 [N]``, a permutation of the rows.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> labels[nested_order(labels)].tolist()
        [0, 1, 0, 1, 0, 1]
    """
    labels = labels_N.numpy()
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        turn[np.random.default_rng((seed, int(label))).permutation(rows)] = np.arange(len(rows))
    return torch.from_numpy(np.lexsort((labels, turn)))


def first(data: EvaluationSet, n: int | None = None, classes: Sequence[str] | None = None, label_space: str = "all") -> EvaluationSet:
    """The first n images of the nested order, of all classes or of some.

    The order is that of the whole data set, so the images of a label space come in the order they have among all.

    Args:
        data: with all its classes.
        n: how many; none: all.
        classes: the label space: keep these classes and classify among their names alone; none: all.
        label_space: its name.

    Raises:
        DataError: an unknown or repeated class, fewer than two, or fewer than n images.
    """
    ordered = data.take(nested_order(data.labels_N))
    if classes is not None:
        if repeated := sorted({name for name in classes if list(classes).count(name) > 1}):
            raise DataError(f"label space {label_space!r} names {', '.join(repeated)} more than once: name each class once.")
        ordered = ordered.select(classes, label_space)
    chosen = len(ordered) if n is None else n
    if not 1 <= chosen <= len(ordered):
        raise DataError(f"n = {n}, but {data.name}/{data.split} has {len(ordered)} images in label space {label_space!r}: "
                        f"set n to 1 .. {len(ordered)}, or to null for all.")
    return ordered.take(torch.arange(chosen))


def first_of_each(
    sets: Sequence[EvaluationSet], n: int | None, label_spaces: Mapping[str, Sequence[str] | None]
) -> list[EvaluationSet]:  # fmt: skip
    """:func:`first` of many sets: n images of each (all, where a set has fewer), in each label space whose classes the set has.

    Args:
        sets: with all their classes.
        n: images of each; none: all.
        label_spaces: name -> classes; none: all classes, of every set.

    Raises:
        DataError: a label space that no set has, or n below 1.
    """
    chosen = []
    for data in sets:
        for space, classes in label_spaces.items():
            if classes is None or set(classes) <= set(data.class_names):
                whole = first(data, None, classes, space)
                chosen.append(whole if n is None else first(data, min(n, len(whole)), classes, space))
    if unused := [space for space in label_spaces if space not in {data.label_space for data in chosen}]:
        raise DataError(f"label spaces {', '.join(unused)}: no set of {', '.join(data.name for data in sets)} has all their classes.")
    return chosen
