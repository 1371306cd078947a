"""Weights in: every way to name them, flags that logits do not reveal, and files that must be refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from aft.clip import ModelSpec, ZeroShotModel, load_model, weights
from aft.errors import WeightsError


def test_the_folder_layout_is_open_clips_own(tiny_folder: Path, model: ZeroShotModel) -> None:
    """open_clip loads the same folder and gives the same embeddings."""
    theirs = open_clip.create_model(f"local-dir:{tiny_folder}").eval()
    pixels, tokens = torch.rand(2, 3, 32, 32), model.tokenizer(["a cat", "a dog"])
    torch.testing.assert_close(model.visual(pixels), theirs.encode_image(pixels))
    torch.testing.assert_close(model.clip.encode_text(tokens), theirs.encode_text(tokens))
    assert weights.file_hash(tiny_folder / "open_clip_model.safetensors") == model.record.sha256


@pytest.mark.parametrize(("name", "tag"), open_clip.list_pretrained())
def test_flags_of_every_tag(name: str, tag: str) -> None:
    """Activation and normalisation are the tag's: a wrong one would not show in the logits of a small model."""
    stored = open_clip.get_pretrained_cfg(name, tag)
    found = weights.describe(name, tag)
    own = name == "roberta-ViT-B-32"  # the one configuration that says quick_gelu itself, under a tag that says nothing
    assert (found.activation == "quick_gelu") == (bool(stored.get("quick_gelu", False)) or own)
    assert found.mean == tuple(stored.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    assert found.std == tuple(stored.get("std") or open_clip.OPENAI_DATASET_STD)


def test_openai_weights_mean_quick_gelu_under_the_plain_name() -> None:
    """``ViT-B-32`` with ``openai`` must not run on exact GELU (the activation really sits in the tower)."""
    architecture = weights.describe("ViT-B-32", "openai")
    with torch.device("meta"):
        clip = weights.build_clip(architecture.config)
    assert architecture.activation == "quick_gelu"
    assert {type(block.mlp.gelu).__name__ for block in clip.visual.transformer.resblocks} == {"QuickGELU"}


def test_random_weights_need_no_file_and_move_no_stream() -> None:
    """Building draws numbers; the caller's stream stays where it was."""
    before = torch.get_rng_state()
    loaded = load_model(ModelSpec("tiny", "random"))
    assert torch.equal(before, torch.get_rng_state()) and loaded.record.layout == "random" and not loaded.training


def test_half_precision_files_become_fp32(tiny_folder: Path, tmp_path: Path) -> None:
    """A small file is a matter of storage."""
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in load_file(tiny_folder / "open_clip_model.safetensors").items()
    }
    save_file(state, tmp_path / "half.safetensors")
    loaded = load_model(ModelSpec("tiny", str(tmp_path / "half.safetensors")))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("layout", ["state_dict", "bare", "module."])
def test_files_with_and_without_wrapping(tiny_folder: Path, tmp_path: Path, layout: str) -> None:
    """A state dict, one inside a dictionary, and one from DataParallel load alike."""
    state = load_file(tiny_folder / "open_clip_model.safetensors")
    torch.save(
        {"state_dict": state} if layout == "state_dict" else {("module." if layout == "module." else "") + k: v for k, v in state.items()},
        tmp_path / "x.pt",
    )
    loaded = load_model(ModelSpec("tiny", str(tmp_path / "x.pt")))
    torch.testing.assert_close(loaded.clip.state_dict(), load_model("tiny").clip.state_dict())


def test_a_misfit_lists_what_is_wrong(tiny_folder: Path, tmp_path: Path) -> None:
    """Missing, unexpected and misshapen tensors are named; nothing is loaded in part."""
    state = load_file(tiny_folder / "open_clip_model.safetensors")
    state.pop("visual.proj")
    state["extra"], state["text_projection"] = torch.zeros(1), torch.zeros(3, 3)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(
        WeightsError, match=r"1 missing: visual\.proj; 1 unexpected: extra; 1 of another shape: text_projection \(3, 3\) for \(16, 16\)"
    ):
        load_model(ModelSpec("tiny", str(tmp_path / "x.safetensors")))


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (self.path,))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    """The code does not run."""
    torch.save({"state_dict": Harmful(tmp_path / "ran")}, tmp_path / "bad.pt")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    for name in ("bad.pt", "raw.pth"):
        with pytest.raises(WeightsError, match="could run code"):
            load_model(ModelSpec("tiny", str(tmp_path / name)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files_are_named(tiny_folder: Path, tmp_path: Path, suffix: str) -> None:
    """A truncated file is no traceback from a library's depths."""
    whole = tmp_path / f"whole{suffix}"
    state = load_file(tiny_folder / "open_clip_model.safetensors")
    save_file(state, whole) if suffix == ".safetensors" else torch.save(state, whole)
    (tmp_path / f"cut{suffix}").write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=f"cut{suffix}"):
        load_model(ModelSpec("tiny", str(tmp_path / f"cut{suffix}")))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ModelSpec("ViT-B32", "random"), "did you mean .*ViT-B-32"),
        (ModelSpec("ViT-B-32", "opnai"), "did you mean 'openai'"),
        (ModelSpec("ViT-B-32"), "needs weights"),
        (ModelSpec("tiny", "nowhere/x.safetensors"), "no weights file at nowhere/x.safetensors"),
    ],
)
def test_unknown_names_list_near_matches(spec: ModelSpec, words: str) -> None:
    """Names, tags and paths that do not exist."""
    with pytest.raises(WeightsError, match=words):
        load_model(spec)


def test_a_file_does_not_say_its_activation(tmp_path: Path) -> None:
    """OpenAI's weights as a file under ``ViT-B-32`` would run on the wrong activation without a word: it must be said."""
    torch.save({}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="set activation to quick_gelu"):
        load_model(ModelSpec("ViT-B-32", str(tmp_path / "x.pt")))
    assert weights._describe_file(ModelSpec("ViT-B-32", activation="quick_gelu")).activation == "quick_gelu"
    assert weights._describe_file(ModelSpec("ViT-B-32-quickgelu")).activation == "quick_gelu"


def test_a_folder_does_not_hide_a_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory called ``openai`` is no weights file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    assert weights._weights_file(ModelSpec("ViT-B-32", "openai")) is None
