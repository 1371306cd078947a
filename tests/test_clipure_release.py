"""The measurement of the released CLIPure in half precision: its batches are those of the release, and what it says follows from them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from aft.batch import EvaluationSet
from aft.clip.stages import encode_in_stages
from aft.defenses import defend
from bench import clipure_release as bench
from tests.conftest import MemoryData


@pytest.fixture
def data():
    """The images in memory as an evaluation set."""
    memory = MemoryData()
    rows = torch.arange(len(memory.labels))
    return EvaluationSet("memory", "test", memory.images, memory.labels, rows, memory.class_lists["train"], memory.templates)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_batches_of_a_size_are_what_the_release_gives_for_them(model, data, size):
    """However many are embedded at once; larger batches are filled up with the neighbours."""
    images = data.batch(range(5)).images
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        released = defend(model, "clipure_cos_release")
    others = data.batch(range(5, 11)).images
    with torch.no_grad():
        shown = encode_in_stages(bench.InBatches(model, size, model.encode(others).embedding_BD), images).embedding_BD
        if size > 5:
            expected = encode_in_stages(released, torch.cat([images, others[: size - 5]])).embedding_BD[:5]
        else:
            expected = torch.cat([encode_in_stages(released, part).embedding_BD for part in images.split(size)])
    torch.testing.assert_close(shown, expected, rtol=1e-3, atol=1e-4)


def test_alone_in_half_precision_its_gradients_are_zero_and_bpda_sees_past_them(model, data, tmp_path, monkeypatch):
    """Batches of one: the input comes back, its gradient through the tower in fp16 is exactly zero, in fp32 it is not."""
    monkeypatch.setattr(bench, "SIZES", (1, 3))
    told = bench.run(model.requires_grad_(False), data, n=3, eps="8/255", steps=2, out=tmp_path / "told.json")
    assert json.loads((tmp_path / "told.json").read_text()) == told and told["images"] == 3
    alone = {precision: told[precision]["batches of 1"] for precision in ("fp32", "fp16")}
    assert alone["fp16"]["zero_gradients_as_released"] == 1.0
    assert all(part["bpda"]["percent"] <= part["clean"]["percent"] for part in alone.values())
    half = bench.halved(model)
    assert half.encode(data.batch([0]).images).embedding_BD.dtype == torch.float16 and model.visual.proj.dtype == torch.float32
