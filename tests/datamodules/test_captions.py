"""Tables of images and captions: every form reads alike, what is missing is named, pre-training learns from them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aft.batch import CaptionedSet, ClassData
from aft.clip import ModelSpec
from aft.errors import ConfigError, DataError
from aft.methods import ContrastivePretraining
from datamodules import Captions, Shards
from datamodules.caption_table import main as caption_table
from datamodules.captions import read_table
from datamodules.manifest import stable_number
from tests.conftest import make_trainer
from tests.datamodules.conftest import png
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


def test_a_table_to_retrieve_from(make_folder, zipped, tmp_path: Path) -> None:
    """Rows with one path are one image with several captions; from a folder or, in place, from a zip; splits are named."""
    folder = make_folder()
    rows = [("cat/000.png", "a cat"), ("dog/000.png", "a dog"), ("cat/000.png", "grey"), ("cat/001.png", "a cat")]
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\n" + "".join(f"{image},{text}\n" for image, text in rows))
    sets = [Captions(test=str(table), images=str(where)).evaluation_set("test") for where in (folder, zipped(folder))]
    for found in sets:
        assert isinstance(found, CaptionedSet) and (len(found), found.index_N.tolist(), found.name) == (3, [0, 1, 2], "pairs")
        assert [[found.class_names[place] for place in true] for true in found.true_texts] == [["a cat", "grey"], ["a dog"], ["a cat"]]
    assert (sets[0].batch([0, 2]).images == sets[1].batch([0, 2]).images).all()
    data = Captions(test=str(table), images=str(folder))
    with pytest.raises(DataError, match="pairs has no train images: give their table as train"):
        data.setup("fit")
    with pytest.raises(DataError, match="pairs has no train images"):
        data.evaluation_set("train")
    with pytest.raises(ConfigError, match="unknown split 'tets'.*did you mean 'test'"):
        data.evaluation_set("tets")
    table.write_text("image,caption\ncat/000.png,a cat\ncow/9.png,a cow\n")
    with pytest.raises(DataError, match="1 of 2 images of .*cow/9.png"):
        Captions(test=str(table), images=str(zipped(folder))).evaluation_set("test")


def test_captions_that_name_the_class(make_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every image once, with its class name in the template; a template without a place is an error with exit status 2."""
    folder, table = make_folder(), tmp_path / "made" / "names.csv"
    assert caption_table([str(folder), str(table), "--template", "one {}"]) == 0 and "12 images" in capsys.readouterr().out
    pairs = read_table(table)
    assert len(pairs) == 12 and pairs[0] == ("cat/000.png", "one cat") and pairs[-1] == ("sea_horse/003.png", "one sea horse")
    found = Captions(test=str(table), images=str(folder)).evaluation_set("test")
    assert len(found) == 12 and len(found.class_names) == 3
    assert caption_table([str(folder), str(table), "--template", "one"]) == 2 and "exactly one" in capsys.readouterr().err


def test_caption_shards_to_retrieve_from(make_shards) -> None:
    """Samples with the same encoded image are one image; lines of a text are captions; numbers are the shards'."""
    repeated = {"003.png": png(1), "001.txt": b"a cat\n\n grey  fur\n", "003.txt": b"a cat", "002.txt": b"a cat"}
    data = Shards("none", test=str(make_shards((3, 3), kind="caption", name="pairs", replace=repeated)))
    found = data.evaluation_set("test")
    assert isinstance(found, CaptionedSet) and len(found) == 5
    texts = [[found.class_names[place] for place in true] for true in found.true_texts]
    assert texts == [["picture 0"], ["a cat", "grey fur"], ["a cat"], ["picture 4"], ["picture 5"]]
    assert found.index_N.tolist() == [stable_number(f"shard-{n // 3:05d}.tar", f"{n:03d}") for n in (0, 1, 2, 4, 5)]
    picture = torch.from_numpy(np.asarray(Image.open(io.BytesIO(png(4))))).permute(2, 0, 1) / 255
    assert torch.equal(found.batch([3]).images[0], picture)
    with pytest.raises(DataError, match="001: no caption in .txt or .json. Make the shards again"):
        Shards("none", test=str(make_shards((3,), kind="caption", name="bare", replace={"001.txt": b" \n"}))).evaluation_set("test")
    labelled = Shards("none", test=str(make_shards(name="labels"))).evaluation_set("test")
    assert not isinstance(labelled, CaptionedSet) and labelled.class_names == ("cat", "dog")
