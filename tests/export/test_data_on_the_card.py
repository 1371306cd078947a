"""What a model was trained on: from the datamodule through checkpoint, weights files and merges to the model card of an export."""

from __future__ import annotations

from pathlib import Path

import pytest

from aft.clip import ModelSpec, load_model
from aft.clip.merge import add_task_vectors
from aft.clip.pack import pack_tower
from aft.clip.training_data import UNSAID
from aft.export.__main__ import main
from datamodules import ImageFolder, Sample
from tests.conftest import MemoryData
from tests.export.models import trained

ROOT = Path(__file__).resolve().parents[2]
SQUARES = {"name": "squares", "terms": "public domain"}
MINI = {"name": "tiny_imagenet32", "terms": "research use"}


@pytest.fixture
def squares(data: MemoryData) -> MemoryData:
    """A datamodule that says what it is."""
    data.name, data.terms = SQUARES.values()  # type: ignore[attr-defined]
    return data


def card_of(model: Path, out: Path, *options: str) -> str:
    """The section on data and licence."""
    main([str(model), "--format", "open_clip", "--out", str(out), *options])
    return (out / "README.md").read_text().split("## Data and licence\n\n")[1].split("\n## ")[0]


def test_a_checkpoint_says_it_and_so_does_its_card(tiny: ModelSpec, squares: MemoryData, tmp_path: Path) -> None:
    """After what is not known of the weights before it; ``--data`` has the last word."""
    checkpoint = trained("tecoa", tiny, squares, tmp_path)
    assert load_model(ModelSpec(pretrained=str(checkpoint))).record.data == (UNSAID, SQUARES)
    said = card_of(checkpoint, tmp_path / "a")
    assert "| data | terms of use |\n|---|---|\n| not known | not known |\n| `squares` | public domain |\n" in said
    said = card_of(checkpoint, tmp_path / "b", "--data", "Rectangles (CC0).")
    assert said.startswith("Rectangles (CC0).\n") and "squares" not in said


def test_a_second_training_adds_its_own(tiny: ModelSpec, squares: MemoryData, tmp_path: Path) -> None:
    """From random weights there is nothing before; the same data twice is said once; a datamodule without a name is its class."""
    (tmp_path / "1").mkdir()
    first = trained("fare", ModelSpec("tiny", "random"), squares, tmp_path / "1")
    assert load_model(ModelSpec(pretrained=str(first))).record.data == (SQUARES,)
    (tmp_path / "2").mkdir()
    again = trained("fare", ModelSpec(pretrained=str(first)), squares, tmp_path / "2")
    assert load_model(ModelSpec(pretrained=str(again))).record.data == (SQUARES,)
    (tmp_path / "3").mkdir()
    other = trained("fare", ModelSpec(pretrained=str(first)), MemoryData(), tmp_path / "3")
    assert load_model(ModelSpec(pretrained=str(other))).record.data == (SQUARES, {"name": "MemoryData", "terms": None})


def test_it_travels_with_files_exports_and_merges(tiny: ModelSpec, squares: MemoryData, tmp_path: Path) -> None:
    """A tower alone, a folder of the hub, a sum of two."""
    checkpoint = trained("tecoa", tiny, squares, tmp_path)
    model = load_model(ModelSpec(pretrained=str(checkpoint)))
    pack_tower(model, tmp_path / "tower.safetensors")
    assert load_model(ModelSpec("tiny", str(tmp_path / "tower.safetensors"))).record.data == (UNSAID, SQUARES)
    for kind in ("open_clip", "hf"):
        main([str(checkpoint), "--format", kind, "--out", str(tmp_path / kind)])
        assert load_model(ModelSpec(pretrained=str(tmp_path / kind))).record.data == (UNSAID, SQUARES)
    base = load_model(tiny)
    assert add_task_vectors(base, [(model, 0.5), (load_model(tiny), 0.5)]).record.data == (UNSAID, SQUARES)


def test_embedded_weights_are_known_and_what_came_after_is_not_guessed(tmp_path: Path) -> None:
    """MiniCLIP-32 by its sha256; a tower fine-tuned from it before files said more has one entry that is not known."""
    mini = load_model("miniclip32")
    assert mini.record.data == (MINI,)
    model = mini
    model.record = type(mini.record)(**{**vars(mini.record), "method": "fare", "data": ()})
    pack_tower(model, tmp_path / "old.safetensors")
    assert load_model(ModelSpec("miniclip32", str(tmp_path / "old.safetensors"))).record.data == (MINI, UNSAID)


def test_nothing_known_is_said_plainly(tiny_folder: Path, tmp_path: Path) -> None:
    """No table of blanks."""
    assert "not known, the weights do not say" in card_of(tiny_folder, tmp_path / "out")


def test_datamodules_know_the_terms_of_known_sets() -> None:
    """By the id of the zero-shot table; what the user says comes first; of other folders nothing is guessed."""
    assert ImageFolder("x/train", name="tiny_imagenet32").terms == "research use"
    cifar100 = ImageFolder("x/train", name="cifar100").terms
    assert cifar100 == "cite the report; no licence text, as for CIFAR-10 (from memory: ask the source)"
    assert ImageFolder("x/train", name="cifar10", terms="ours").terms == "ours" and ImageFolder("photos/train").terms is None
    assert Sample().terms == ImageFolder("x/train", name="cifar10").terms and Sample(terms="ours").terms == "ours"
