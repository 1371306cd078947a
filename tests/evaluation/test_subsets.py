"""Laws of subsets: they nest, are balanced, and a label space takes its images in the order they have among all."""

from __future__ import annotations

import pytest
import torch

from aft.errors import DataError
from aft.evaluation.subsets import first, nested_order


def test_the_order_is_a_fixed_permutation_and_balanced():
    """Every row once; the first n hold each class equally often, to within one; only the seed changes it."""
    labels = torch.randint(0, 7, (500,), generator=torch.Generator().manual_seed(0))
    order = nested_order(labels)
    assert torch.equal(order.sort().values, torch.arange(500)) and torch.equal(order, nested_order(labels))
    for n in range(1, int(labels.bincount().min()) * 7):
        counts = labels[order[:n]].bincount(minlength=7)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(order, nested_order(labels, seed=1))
    assert not torch.equal(order[labels[order] == 0], (labels == 0).nonzero().flatten()), "classes are shuffled inside"


def test_smaller_subsets_begin_larger_ones(data):
    """The first 7 of 20 are the subset of 7, images included."""
    small, large = first(data, 7), first(data, 20)
    assert torch.equal(small.index_N, large.index_N[:7])
    assert torch.equal(small.batch([3]).images, large.batch([3]).images)
    assert set(first(data).index_N.tolist()) == set(data.index_N.tolist())


def test_a_label_space_takes_its_images_in_the_common_order(data):
    """Selected classes alone, numbered anew, in the order of the whole set; the image still belongs to its index."""
    names = tuple(data.class_names[label] for label in data.labels_N.unique()[:2].tolist())[::-1]
    some, order = first(data, None, names, "two"), nested_order(data.labels_N)
    wanted = [int(data.index_N[row]) for row in order if data.class_names[data.labels_N[row]] in names]
    assert wanted != sorted(wanted)
    assert some.index_N.tolist() == wanted and some.label_space == "two" and some.class_names == names
    place = data.index_N.tolist().index(int(some.index_N[0]))
    assert torch.equal(some.batch([0]).images[0], data.images[place])
    assert names[some.labels_N[0]] == data.class_names[data.labels_N[place]]


@pytest.mark.parametrize("n, classes, words", [
    (41, None, "has 40 images"), (0, None, "n = 0"), (None, ["ant", "bea"], "did you mean 'bee'"), (None, ["ant", "ant"], "more than once"),
])  # fmt: skip
def test_what_the_set_does_not_hold_is_an_error(data, n, classes, words):
    """Too many or no images, an unknown class, a repeated one."""
    with pytest.raises(DataError, match=words):
        first(data, n, classes, "space")
