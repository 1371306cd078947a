"""Weights in: every way to name them, flags that logits do not reveal, and files that must be refused."""

from __future__ import annotations

import copy
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from aft.clip import ModelSpec, ZeroShotModel, architectures, load_model, weights
from aft.clip.enlarge import regrid
from aft.clip.fit import check_fit, sizes_of_config, sizes_of_state
from aft.clip.patches import embed_by_convolution
from aft.errors import ConfigError, WeightsError
from tests.conftest import TINY


def assert_same(loaded: ZeroShotModel, expected: ZeroShotModel) -> None:
    """The same logits on random images."""
    images, names = torch.rand(2, 3, 32, 32), ("cat", "dog", "ship")
    ours, theirs = (model(images, model.text_bank(names, ("a {}",))) for model in (loaded, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


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
        (ModelSpec("miniclip46"), "did you mean .*miniclip64"),
        (ModelSpec("ViT-B-32", "opnai"), "did you mean 'openai'"),
        (ModelSpec("ViT-B-32"), "needs weights"),
        (ModelSpec("tiny", "nowhere/x.safetensors"), "no weights file at nowhere/x.safetensors"),
    ],
)
def test_unknown_names_list_near_matches(spec: ModelSpec, words: str) -> None:
    """Names, tags and paths that do not exist."""
    with pytest.raises(WeightsError, match=words):
        load_model(spec)


def test_a_file_does_not_say_its_activation(tiny_folder: Path) -> None:
    """OpenAI's weights as a file under ``ViT-B-32`` would run on the wrong activation without a word: it must be said."""
    with pytest.raises(WeightsError, match="set activation to quick_gelu"):
        load_model(ModelSpec("ViT-B-32", str(tiny_folder / "open_clip_model.safetensors")))
    assert architectures.describe_file("ViT-B-32", "quick_gelu").activation == "quick_gelu"
    assert architectures.describe_file("ViT-B-32-quickgelu", None).activation == "quick_gelu"


def test_a_folder_does_not_hide_a_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory called ``openai`` is no weights file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    assert weights._weights_file(ModelSpec("ViT-B-32", "openai")) is None


def test_a_known_tag_wins_over_a_folder_that_holds_a_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``openai`` stays the tag, ``./openai`` is the folder; a name that is no tag may be either."""
    for name in ("openai", "mine"):
        shutil.copytree(tiny_folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert weights._weights_file(ModelSpec("ViT-B-32", "openai")) is None
    for path in (f"{tmp_path}/openai", "mine"):
        assert weights._weights_file(ModelSpec("ViT-B-32", path)) == Path(path) / "open_clip_model.safetensors"


def test_a_torchscript_archive_is_refused_with_a_remedy(tmp_path: Path) -> None:
    """OpenAI's own downloads are programs; the message says what to take instead."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(WeightsError, match=r"TorchScript archive.*Take the tag 'openai'.*torch\.jit\.load"):
        load_model(ModelSpec("tiny", str(tmp_path / "ViT-B-32.pt")))


def test_numbers_of_numpy_beside_the_tensors_do_not_stop_a_file(tiny_folder: Path, tmp_path: Path, model: ZeroShotModel) -> None:
    """TeCoA's code stores the best accuracy as numpy's float64."""
    state = load_file(tiny_folder / "open_clip_model.safetensors")
    torch.save({"best_acc1": np.float64(38.2), "state_dict": state, "last": np.float32(1)}, tmp_path / "x.pth.tar")
    assert_same(load_model(ModelSpec("tiny", str(tmp_path / "x.pth.tar"))), model)


def test_mean_and_std_of_the_user_reach_the_pixels_and_the_record(tiny: ModelSpec, model: ZeroShotModel) -> None:
    """PMG-AFT's own checkpoints need ImageNet's."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    changed, images = load_model(replace(tiny, mean=mean, std=std)), torch.rand(2, 3, 32, 32)
    expected = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(changed.pixels(images), expected)
    assert (changed.record.mean, changed.record.std) == (mean, std) != (model.record.mean, model.record.std)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": (123.7, 116.3, 103.5)}, "divide by 255"),
        ({"mean": (0.5, 0.5)}, "three numbers"),
        ({"std": (0.2, 0.0, 0.2)}, "std = "),
        ({"std": (0.2, float("nan"), 0.2)}, "std = "),
        ({"image_size": 0}, "side of the square"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    """Before any file is read."""
    with pytest.raises(ConfigError, match=words):
        ModelSpec("tiny", **settings)


def test_an_activation_against_the_models_own_is_refused(tiny: ModelSpec, tiny_folder: Path) -> None:
    """A tag, a folder or an embedded model knows its activation; a wrong one would not show."""
    for spec in (replace(tiny, activation="quick_gelu"), ModelSpec(pretrained=str(tiny_folder), activation="quick_gelu")):
        with pytest.raises(WeightsError, match="says that it was trained with gelu"):
            load_model(spec)


def test_another_image_size_warns_and_is_open_clips_own_resize(tiny_folder: Path) -> None:
    """Bicubic interpolation of the positions: what open_clip gives with force_image_size, to the bit where patches are a convolution."""
    with pytest.warns(UserWarning, match="images of 32 px to 48 px"):
        loaded = load_model(ModelSpec("tiny", image_size=48))
    embed_by_convolution(loaded.visual)
    theirs = open_clip.create_model(f"local-dir:{tiny_folder}", force_image_size=48).eval()
    images = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(loaded.encode(images).embedding_BD, theirs.encode_image(loaded.pixels(images)), rtol=0, atol=0)
    vision: Any = loaded.record.config["vision_cfg"]
    assert loaded.record.resolution == vision["image_size"] == 48
    assert weights.build_clip(loaded.record.config).state_dict().keys() == loaded.clip.state_dict().keys()
    weights.load_strictly(weights.build_clip(loaded.record.config), loaded.clip.state_dict(), "the record's architecture")


def test_an_image_size_must_suit_the_tower(tiny: ModelSpec) -> None:
    """Whole patches, and a tower that has a position embedding to interpolate."""
    with pytest.raises(WeightsError, match="image_size = 45 is no multiple of the patch size 8: take 40"):
        load_model(replace(tiny, image_size=45))
    with pytest.raises(WeightsError, match="image_size needs a ViT"), torch.device("meta"):
        regrid(weights.build_clip(open_clip.get_model_config("RN50")), 448)


def test_a_file_of_another_input_size_needs_image_size(tiny_folder: Path, tmp_path: Path) -> None:
    """Silently interpolated positions would be another model: the error names both sizes and the setting."""
    with pytest.warns(UserWarning):
        save_file(load_model(ModelSpec("tiny", image_size=48)).clip.state_dict(), tmp_path / "48.safetensors")
    with pytest.raises(WeightsError, match=r"the file has input size 48, tiny has 32\. Set image_size to 32"):
        load_model(ModelSpec("tiny", str(tmp_path / "48.safetensors")))
    whole = load_model(ModelSpec("tiny", str(tmp_path / "48.safetensors"), image_size=48))  # the file's own size: no interpolation
    assert whole.record.resolution == 48
    with pytest.warns(UserWarning, match="images of 48 px to 32 px"):
        assert load_model(ModelSpec("tiny", str(tmp_path / "48.safetensors"), image_size=32)).record.resolution == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 48}, "the file has width 48, tiny has 32"),
        ({"patch_size": 4, "image_size": 16}, "the file has patch size 4, tiny has 8; the file has input size 16, tiny has 32"),
        ({"layers": 3}, "the file has layers 3, tiny has 2"),
        ({"embed_dim": 24}, "the file has embed_dim 24, tiny has 16"),
        ({"image_size": 40}, "the file has input size 40, tiny has 32"),
        ({"layers": [1, 1, 1, 1], "width": 16, "patch_size": None}, "the file has image tower ResNet, tiny has ViT"),
    ],
)
def test_a_tower_of_other_sizes_is_named_in_words(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Width, patch, input size, layers and embedding width, each in a sentence, before any list of tensors."""
    config = copy.deepcopy(TINY["model_cfg"])
    config["embed_dim"] = changes.pop("embed_dim", 16)
    config["vision_cfg"] |= changes
    torch.save(weights.build_clip(config).visual.state_dict(), tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=words):
        load_model(ModelSpec("tiny", str(tmp_path / "x.pt")))


def test_the_error_lists_names_that_would_fit() -> None:
    """ViT-L/14 weights in a ViT-B/32: the way out is in the message."""
    config = open_clip.get_model_config("ViT-L-14")
    with pytest.raises(WeightsError, match=r"the file has width 1024, ViT-B-32 has 768; .*choose a name that fits the file: ViT-L-14,"):
        check_fit(sizes_of_config(config), open_clip.get_model_config("ViT-B-32"), "ViT-B-32", "x.pt")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-336", "RN50", "RN50x4", "ViT-SO400M-14-SigLIP-384", "convnext_base_w"])
def test_sizes_of_weights_and_of_configurations_agree(name: str) -> None:
    """A right file must not be refused: both readings of one architecture are the same."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        state = weights.build_clip(config).state_dict()
    given, wanted = sizes_of_state(state), sizes_of_config(config)
    assert {size: wanted[size] for size in given} == given and given["image tower"] == wanted["image tower"]
