"""Tables of images and captions: every form reads alike, what is missing is named, pre-training learns from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aft.batch import ClassData
from aft.clip import ModelSpec
from aft.errors import ConfigError, DataError
from aft.methods import ContrastivePretraining
from datamodules import Captions
from datamodules.captions import read_table
from tests.conftest import make_trainer
from tests.datamodules.test_order import fit

PAIRS = [("train/cat/000.png", "a cat, grey"), ("train/cat/001.png", 'a "cat"'), ("train/dog/000.png", "ein Hund fällt")]


def write(folder: Path, ending: str) -> Path:
    """The pairs as a table."""
    path, records = folder / f"pairs{ending}", [{"image": image, "caption": text} for image, text in PAIRS]
    if ending == ".csv":
        text = "image,caption\n" + "".join(f'{image},"{text.replace(chr(34), chr(34) * 2)}"\n' for image, text in PAIRS)
    elif ending == ".tsv":
        text = "\ufeffimage\tcaption\n" + "".join('{}\t"{}"\n'.format(image, text.replace('"', '""')) for image, text in PAIRS)
    else:
        text = json.dumps(records) if ending == ".json" else "\n".join(map(json.dumps, records))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl"])
def test_every_form_reads_alike(make_folder, tmp_path: Path, ending: str) -> None:
    """Quotes, commas, umlauts, a byte-order mark; the batch has captions, images by the same number, and no labels."""
    make_folder()
    table = write(tmp_path, ending)
    assert read_table(table) == PAIRS
    data = Captions(str(table), batch_size=3, augment="none")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert isinstance(data, ClassData) and batch.labels is None
    assert [PAIRS[number][1] for number in batch.index.tolist()] == batch.captions
    elsewhere = tmp_path / "tables"
    elsewhere.mkdir()
    table.rename(elsewhere / table.name)
    assert len(Captions(str(elsewhere / table.name), images=str(tmp_path), batch_size=1).train_dataloader()) == 3


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.csv", "image,caption\nx.png,\n", r"1 of 1 rows lack an image or a caption \(rows 1\)"),
    ("a.csv", "image,caption\nx.png,hi\nx.png\n", r"rows 2"), ("a.csv", "image,title\nx.png,hi\n", "unknown column 'caption'"),
    ("a.csv", "image,caption\nabsent.png,hi\n", r"1 of 1 images of .* are not in .* \(absent.png\)"),
    ("a.csv", "image,caption\n", "has no rows"), ("a.csv", "", "has no rows"), ("a.txt", "x", "its ending is '.txt'"),
    ("a.json", "{", "cannot be read"), ("a.json", '{"image": "x"}', "a list of records"), ("a.jsonl", "[1]\n", "a list of records"),
    ("a.json", '[{"image": "x.png", "caption": ["a", "b"]}]', "lack an image or a caption"), ("absent.csv", None, "cannot be read")])
def test_what_is_missing_is_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    """Captions, columns, files, rows."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        Captions(str(tmp_path / name)).setup("fit")


@pytest.mark.filterwarnings("ignore")
def test_resume_and_training(make_folder, tmp_path: Path) -> None:
    """Resumed in mid-epoch it sees the rest; pre-training makes its steps; too large a batch is an error."""
    folder = make_folder(per_class=4)
    rows = [f"train/{path.parent.name}/{path.name},picture of {path.parent.name} {path.stem}" for path in sorted(folder.rglob("*.png"))]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    whole = fit(Captions(str(tmp_path / "pairs.csv"), batch_size=3), tmp_path / "whole", 2)
    rest = fit(Captions(str(tmp_path / "pairs.csv"), batch_size=3), tmp_path / "rest", 2, tmp_path / "whole" / "step=3.ckpt")
    assert len(whole.seen) == 8 and rest.seen == whole.seen[3:]
    trainer = make_trainer(tmp_path, enable_checkpointing=True)
    trainer.fit(ContrastivePretraining(ModelSpec("tiny", "random")), datamodule=Captions(str(tmp_path / "pairs.csv"), batch_size=6,
                                                                                       image_size=32))
    assert trainer.global_step == 2
    with pytest.raises(ConfigError, match="needs 13 training images"):
        Captions(str(tmp_path / "pairs.csv"), batch_size=13).train_dataloader()
