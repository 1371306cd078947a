"""Laws of examples: they are the images that were attacked, in the order of the data, as PNGs inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from aft.batch import EvaluationSet
from aft.clip import load_model
from aft.errors import DataError
from aft.evaluation import Cell, evaluate, first, plan
from aft.evaluation.collect import collect
from aft.evaluation.pages import attacked, examples, kept
from aft.losses import text_guided_attention


def pixels(picture):
    """A picture's bytes, ``[H, W, 3]``."""
    start, _, content = picture.uri.partition(",")
    assert start == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert image.format == "PNG"
    return np.asarray(image)


@pytest.fixture
def seen(tiny):
    """Thirty random images of 32 px; the tiny model calls every second one right."""
    model = load_model(tiny)
    images = torch.rand(30, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    names = ("cat", "dog", "ship")
    with torch.no_grad():
        said = model(images, model.text_bank(names, ("a {}",))).argmax(1)
    labels = torch.where(torch.arange(30) % 2 == 0, said, (said + 1) % 3)
    return model, EvaluationSet("toy", "test", images, labels, torch.arange(30) + 100, names, ("a {}",))


def test_examples_show_what_the_attack_did_and_where_the_text_is_found(seen):
    """Right before, a difference in the ball, and the attention of the losses before and under attack, in five columns."""
    model, data = seen
    (told,) = attacked([("tiny", model)], data, 4)
    assert told.title == "tiny" and len(told.examples) == 4
    assert told.columns[2:] == ["difference × 64", "attention before", "attention under attack"]
    assert "2/255" in told.how and model.record.sha256[:12] in told.how and "first 4 images" in told.how
    ordered = first(data)
    batch = ordered.batch(range(len(ordered)))
    texts = model.text_bank(data.class_names, data.templates)
    with torch.no_grad():
        right = model(batch.images, texts).argmax(1) == batch.labels
    rows = right.nonzero().flatten()[:4]
    for one, row in zip(told.examples, rows.tolist(), strict=True):
        before, under, difference, _, _ = (pixels(picture).astype(int) for picture in one.pictures)
        assert np.array_equal(before, (batch.images[row] * 255).round().permute(1, 2, 0).numpy().astype(int))
        assert one.truth == one.before == data.class_names[batch.labels[row]] and one.right == (one.under == one.truth)
        assert 1 <= abs(under - before).max() <= 3  # two grey levels, and the rounding of both
        assert np.all((difference > 128) >= (under - before > 1)) and np.all((difference < 127) >= (under - before < -1))
    with torch.no_grad():
        tokens = model.encode(batch.images[rows[:1]], tokens=True).tokens_BND
        (found,) = text_guided_attention(tokens, texts[batch.labels[rows[:1]]], 32).view(-1, 32, 32).numpy()
    drawn = pixels(told.examples[0].pictures[3]).astype(int)
    blue, yellow = np.unravel_index(found.argmin(), found.shape), np.unravel_index(found.argmax(), found.shape)
    assert drawn[blue][2] > drawn[blue][0] and drawn[yellow][0] > drawn[yellow][2]


def test_all_models_are_shown_the_same_images(seen):
    """Those that each of them calls right; where there are none it is said."""
    model, data = seen
    other = load_model("tiny")
    with torch.no_grad():
        for parameter in other.visual.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        said_a, said_b = (one(data.images, one.text_bank(data.class_names, data.templates)).argmax(1) for one in (model, other))
    mixed = replace(data, labels_N=torch.where(torch.arange(30) % 2 == 0, said_a, said_b))
    agreed = int((said_a == said_b).sum())
    assert 0 < agreed < 30
    one, two = attacked([("a", model), ("b", other)], mixed, 30)
    assert len(one.examples) == agreed and [example.truth for example in one.examples] == [example.truth for example in two.examples]
    with torch.no_grad():
        never = (model(data.images, model.text_bank(data.class_names, data.templates)).argmax(1) + 1) % 3
    with pytest.raises(DataError, match="none of the first 30 images of toy is called right by a, b"):
        attacked([("a", model), ("b", model)], replace(data, labels_N=never), 3)


def test_a_tower_without_tokens_has_no_attention(model, data):
    """The other columns are there (here a tower that is no transformer)."""
    from tests.evaluation.conftest import make_data, make_model

    plain = make_model()
    (told,) = attacked([("plain", plain)], make_data(plain), 2)
    assert len(told.columns) == 3 and all(len(one.pictures) == 3 for one in told.examples)


def test_kept_images_need_no_model(seen, tmp_path, monkeypatch):
    """What ``keep_images`` left beside a card: the first right images, clean, attacked, and the answers on the card's verdicts."""
    model, data = seen
    cell = Cell(model, first(data, 20), plan("pgd", eps="8/255", steps=3, targets=1, classes=3))
    evaluate(cell, tmp_path, "m", batch_size=7, keep_images=True)
    evaluate(Cell(model, first(data, 20), plan("clean", eps=0, steps=1, targets=1, classes=3)), tmp_path, "m", keep_images=True)
    monkeypatch.setattr(examples, "scoring", None)
    found = collect([tmp_path])
    (told,) = kept(found)
    place = next(i for i, (_, card) in enumerate(found.labelled) if card["threat"])
    table = found.verdicts(place)
    rows = table["row"][table["clean"]][: examples.COUNT]
    assert told.title == "m, eps 8/255" and len(told.examples) == len(rows) and told.columns[2] == "difference × 16"
    for one, row in zip(told.examples, rows, strict=True):
        clean, under, _ = (pixels(picture).astype(int) for picture in one.pictures)
        wanted = (cell.data.batch([int(row)]).images[0] * 255).round().permute(1, 2, 0).numpy()
        assert np.array_equal(clean, wanted.astype(int)) and 1 <= abs(clean - under).max() <= 9
        assert one.truth == data.class_names[table["label"][row]] and one.under == data.class_names[table["answer"][row]]
        assert one.right == table["right"][row, -1]
    (tmp_path / "parts").rename(tmp_path / "moved")
    assert kept(collect([tmp_path])) == []


def test_large_images_are_made_small():
    """A page of photographs stays small; the sides keep their ratio."""
    (before, *_) = examples._pair(torch.rand(3, 224, 112), torch.rand(3, 224, 112), 1 / 255)
    assert pixels(before).shape == (112, 56, 3)
