"""Checkpoints of every method, of every way to train a tower and of merged weights: out, and in again the same; or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aft.clip import ModelSpec, TrainableSpec, load_model
from aft.clip.merge import interpolate
from aft.errors import AftError, ConfigError, WeightsError
from aft.export import export
from aft.export.__main__ import main
from tests.conftest import MemoryData
from tests.export.models import trained
from tests.methods.recipes import RECIPES

REFUSED = {"laat": "text_transform expansion", "tima": "text_transform residual"}


def assert_out_and_in(checkpoint: Path, folder: Path) -> None:
    """The same tensors, recipe and flags, by way of open_clip's layout; the teacher and the optimiser stay behind."""
    model = load_model(ModelSpec(pretrained=str(checkpoint)))
    main([str(checkpoint), "--format", "open_clip", "--out", str(folder)])
    back = load_model(ModelSpec(pretrained=str(folder)))
    ours, theirs = model.clip.state_dict(), back.clip.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    record = back.record
    assert all(getattr(record, key) == getattr(model.record, key) for key in ("method", "eps_trained", "activation"))
    tensors = sum(value.numel() * value.element_size() for value in ours.values())
    assert (folder / "open_clip_model.safetensors").stat().st_size < tensors + 20_000


@pytest.mark.parametrize("name", RECIPES)
def test_every_methods_checkpoint(name: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Two steps of it, then out and in; methods that transform texts say that the layout has no place for them."""
    checkpoint = trained(name, tiny, data, tmp_path)
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name]):
            assert_out_and_in(checkpoint, tmp_path / "out")
        return
    assert_out_and_in(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    "spec", [TrainableSpec("lora", rank=2), TrainableSpec("last"), TrainableSpec("prompts", pad=2, tokens=1)], ids=lambda spec: spec.name
)
def test_every_way_to_train_a_tower(spec: TrainableSpec, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Low-rank updates are merged into plain weights; prompts are refused."""
    checkpoint = trained("tecoa", tiny, data, tmp_path, trainable=spec)
    if spec.name == "prompts":
        with pytest.raises(ConfigError, match="visual prompts"):
            assert_out_and_in(checkpoint, tmp_path / "out")
        return
    assert_out_and_in(checkpoint, tmp_path / "out")


def test_merged_weights_by_the_command(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """``--add`` is ``aft.clip.merge``; the sum is in the recipe, and travels."""
    checkpoint = trained("fare", tiny, data, tmp_path)
    main(["tiny", "--add", f"{checkpoint}=0.5", "--format", "open_clip", "--out", str(tmp_path / "out")])
    back = load_model(ModelSpec(pretrained=str(tmp_path / "out")))
    expected = interpolate(load_model(tiny), load_model(ModelSpec(pretrained=str(checkpoint))), 0.5)
    assert all(torch.equal(value, back.clip.state_dict()[key]) for key, value in expected.clip.state_dict().items())
    assert back.record.method == expected.record.method and back.record.method.startswith("merge(0.5*")


def test_the_command_says_what_is_wrong(tiny: ModelSpec, tiny_folder: Path, tmp_path: Path) -> None:
    """A tower without its base, no such file, a sum that is none, a format that is none: before anything is written."""
    visual = tmp_path / "tower.pt"
    torch.save(load_model(tiny).visual.state_dict(), visual)
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(WeightsError, match="holds an image tower alone: set base"):
        main([str(visual), "--name", "ViT-B-32", "--format", "open_clip", *out])
    for missing in (tmp_path / "none.ckpt", "runs/none.safetensors", "runs/photos/checkpoints"):
        with pytest.raises(AftError, match=f"no weights file at {missing}"):
            main([str(missing), "--format", "open_clip", *out])
    with pytest.raises(ConfigError, match="FILE=FACTOR"):
        main(["tiny", "--add", f"{visual}=half", "--format", "open_clip", *out])
    with pytest.raises(ConfigError, match="unknown format 'onix': did you mean 'onnx'"):
        main(["tiny", "--format", "onix", *out])
    assert not (tmp_path / "out").exists()
    main([str(visual), "--name", "tiny", "--base", str(tiny_folder), "--format", "open_clip", *out])
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "open-clip"], "unknown format 'open-clip': did you mean 'open_clip'"),
        (["--format", "hf", "--out", "full"], "is not empty"),
        (["--format", "hf", "--classes", "cat"], "--classes: hf has no class head"),
        (["--format", "onnx", "--half"], "--half: onnx is a graph in fp32"),
        (["--format", "onnx", "--templates", "a {}"], "--templates without --classes would do nothing"),
        (["--format", "onnx", "--settings", "{}"], "--settings without --defense would do nothing"),
    ],
)
def test_what_is_wrong_whichever_the_model_is_said_before_it_is_read(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong letter should not cost the minutes that a large one takes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    monkeypatch.setattr("aft.export.__main__.load", lambda given: pytest.fail("the model was read"))
    with pytest.raises(ConfigError, match=words):
        main(["tiny", "--out", "out", *options])


def test_a_graph_is_not_taken_for_weights(tiny: ModelSpec, tmp_path: Path) -> None:
    """Who hands a graph to this project is told what to hand instead."""
    export(load_model(tiny), "torch_export", tmp_path / "out")
    with pytest.raises(WeightsError, match=r"image.pt2 is a graph that runs, not weights: give the checkpoint"):
        load_model(ModelSpec("tiny", str(tmp_path / "out" / "image.pt2")))
