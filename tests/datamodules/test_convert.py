"""The converter: what it writes is what lay in the source, to the byte at every run; it never writes over anything."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from aft.errors import ConfigError, DataError
from datamodules import ImageFolder, Shards
from datamodules.convert import main
from datamodules.manifest import FILE, Location, read
from datamodules.shard_reader import ShardIndex
from datamodules.shard_writer import encode


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_what_the_source_held(make_folder, zipped, tmp_path: Path) -> None:
    """Without --resize the files themselves: pixels, labels and names are the folder's; a zip gives the same samples."""
    folder = make_folder(per_class=5)
    assert main([str(folder), str(tmp_path / "out"), "--per-shard", "4"]) == [tmp_path / "out"]
    found, whole = Shards(str(tmp_path / "out")), ImageFolder(str(folder))
    ours, theirs = found.evaluation_set("train"), whole.evaluation_set("train")
    index = ShardIndex(Location(str(tmp_path / "out")), read(Location(str(tmp_path / "out"))))
    rows = [int(key) for _, key, _ in index.members]  # a key is the place in the source
    assert sorted(rows) == list(range(15)) and rows != list(range(15))
    assert torch.equal(ours.batch(range(15)).images, theirs.batch(rows).images) and ours.labels_N.tolist() == theirs.labels_N[rows].tolist()
    assert found.class_phrases == whole.class_phrases
    assert all(index.read(place) == whole.listing("train").source.read(row) for place, row in enumerate(rows))
    main([str(zipped(folder)), str(tmp_path / "zip"), "--per-shard", "4"])
    one, other = (bytes_of(tmp_path / name) for name in ("out", "zip"))
    assert {name: data for name, data in one.items() if name != FILE} == {name: data for name, data in other.items() if name != FILE}


@pytest.mark.parametrize("resize", [None, 6])
def test_the_same_input_gives_the_same_bytes(make_folder, tmp_path: Path, resize: int | None) -> None:
    """Shards and manifest, twice; another seed gives another order."""
    folder = str(make_folder(size=(9, 12)))
    extra = [] if resize is None else ["--resize", str(resize)]
    for name in ("a", "b"):
        main([folder, str(tmp_path / name), "--per-shard", "5", "--holdout", "3", *extra])
    for seed in ("0", "1"):
        main([folder, str(tmp_path / seed), "--seed", seed, *extra])
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") and bytes_of(tmp_path / "0") != bytes_of(tmp_path / "1")
    assert bytes_of(tmp_path / "a-holdout") == bytes_of(tmp_path / "b-holdout")
    manifest = json.loads((tmp_path / "a" / FILE).read_text())
    assert (manifest["resize"], manifest["quality"]) == (resize, 95 if resize else None)
    assert manifest["samples"] == 9 and [shard["samples"] for shard in manifest["shards"]] == [5, 4]
    assert str(tmp_path) not in (tmp_path / "a" / FILE).read_text()


def test_resize_is_of_the_shorter_side(tmp_path: Path) -> None:
    """Larger images become JPEGs of this shorter side, aspect kept; others keep their bytes; a BMP becomes a PNG of the same pixels."""
    def picture(size: tuple[int, int], kind: str) -> bytes:
        data = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(data, kind)
        return data.getvalue()

    for size, expected in (((40, 20), (20, 10)), ((15, 30), (10, 20))):
        ending, data = encode(picture(size, "PNG"), 10, 95)
        assert ending == "jpg" and Image.open(io.BytesIO(data)).size == expected
    for kind, ending in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        small = picture((10, 14), kind)
        assert encode(small, 10, 95) == encode(small, None, 95) == (ending, small)
    bitmap = picture((10, 14), "BMP")
    ending, data = encode(bitmap, None, 95)
    assert ending == "png" and np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(Image.open(io.BytesIO(bitmap))))


def test_holdout_is_balanced_and_disjoint(make_folder, tmp_path: Path) -> None:
    """No image is in both sets."""
    main([str(make_folder(per_class=6)), str(tmp_path / "out"), "--holdout", "6"])
    keys = [{key for _, key, _ in ShardIndex(Location(str(path)), read(Location(str(path)))).members}
            for path in (tmp_path / "out", tmp_path / "out-holdout")]
    assert not keys[0] & keys[1] and len(keys[0]) == 12
    assert Shards(str(tmp_path / "out-holdout")).evaluation_set("train").labels_N.bincount().tolist() == [2, 2, 2]
    with pytest.raises(ConfigError, match="takes all 18 images"):
        main([str(tmp_path / "train"), str(tmp_path / "other"), "--holdout", "18"])


def test_nothing_is_written_over(make_folder, tmp_path: Path) -> None:
    """A folder with anything in it is refused, also the one for held-out images, before anything is written."""
    folder = str(make_folder())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-00000.tar.part").write_bytes(b"")
    with pytest.raises(DataError, match="'.*out' is not an empty folder.* if a conversion stopped there, delete it"):
        main([folder, str(tmp_path / "out")])
    (tmp_path / "new-holdout").mkdir()
    (tmp_path / "new-holdout" / "x").write_bytes(b"")
    with pytest.raises(DataError, match="new-holdout"):
        main([folder, str(tmp_path / "new"), "--holdout", "3"])
    assert not (tmp_path / "new").exists()


def test_a_stopped_conversion_is_no_set(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest comes last: what a killed run leaves cannot be trained on, and the next run says what to do."""
    folder = str(make_folder())
    monkeypatch.setattr("datamodules.shard_writer.sha256", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main([folder, str(tmp_path / "out"), "--per-shard", "4"])
    monkeypatch.undo()
    assert any((tmp_path / "out").glob("*.tar"))
    with pytest.raises(DataError, match="is no manifest"):
        Shards(str(tmp_path / "out")).setup("fit")
    with pytest.raises(DataError, match="delete it"):
        main([folder, str(tmp_path / "out")])


def test_damaged_images_are_left_out(make_folder, tmp_path: Path) -> None:
    """Counted and named; above the share there is no manifest."""
    folder = make_folder(ending="jpg", size=(64, 64))
    (folder / "dog" / "001.jpg").write_bytes((folder / "dog" / "001.jpg").read_bytes()[:-200])
    with pytest.warns(UserWarning, match="1 of 12 images are damaged: .*dog/001.jpg"):
        main([str(folder), str(tmp_path / "out"), "--per-shard", "5", "--max-bad-share", "0.1"])
    assert read(Location(str(tmp_path / "out"))).samples == 11
    with pytest.raises(DataError, match="At most a share of 0.01"):
        main([str(folder), str(tmp_path / "strict")])
    assert not (tmp_path / "strict" / FILE).exists()


def test_captions_become_shards(make_folder, tmp_path: Path) -> None:
    """A table of paths and texts; holding out is refused, as captions have no classes."""
    make_folder(("a",), per_class=6)
    rows = [f"train/a/{number:03d}.png\tpicture  {number}" for number in range(6)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    columns = ["--image-column", "filepath", "--caption-column", "title"]
    main([str(tmp_path / "pairs.tsv"), str(tmp_path / "out"), "--per-shard", "3", *columns])
    batch = next(iter(Shards(str(tmp_path / "out"), batch_size=6).train_dataloader()))
    assert sorted(batch.captions) == [f"picture {number}" for number in range(6)] and batch.labels is None
    with pytest.raises(ConfigError, match="captions have no classes"):
        main([str(tmp_path / "pairs.tsv"), str(tmp_path / "more"), "--holdout", "2", *columns])


def test_manifest_of_shards_that_exist(make_shards, tmp_path: Path) -> None:
    """Shards of others get a manifest; class names from a file, else their numbers, and a second run keeps what is there."""
    folder = make_shards()
    before = read(Location(str(folder)))
    main([str(folder), "--manifest-only"])
    assert read(Location(str(folder))) == before
    (folder / FILE).unlink()
    main([str(folder), "--manifest-only"])
    assert read(Location(str(folder))).classes == (("0",), ("1",))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    main([str(folder), "--manifest-only", "--classes", str(tmp_path / "names.txt")])
    assert read(Location(str(folder))).classes == (("cat",), ("dog",))
    pairs = make_shards(kind="caption", name="pairs")
    (pairs / FILE).unlink()
    main([str(pairs), "--manifest-only"])
    assert read(Location(str(pairs))).kind == "caption"
    with pytest.raises(DataError, match="holds no .tar"):
        main([str(tmp_path), "--manifest-only"])


@pytest.mark.parametrize("words", [["--per-shard", "0"], ["--resize", "0"], ["--quality", "101"], ["--quality", "0"]])
def test_settings_out_of_range_are_errors(make_folder, tmp_path: Path, words: list[str]) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError):
        main([str(make_folder()), str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_last_line_is_a_command_that_trains(make_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Run for one step on a tiny tower: classes with held-out images, and captions."""
    monkeypatch.chdir(train.HERE)
    make_folder(("cat", "dog"), per_class=12)
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f'train/cat/{n:03d}.png,"cat, number {n}"\n' for n in range(12)))
    small = ["--model.init_args.clip.name=tiny", "--model.init_args.clip.pretrained=random", "--data.init_args.batch_size=4",
             "--data.init_args.image_size=32", "--trainer.max_steps=1", "--trainer.accelerator=cpu",
             f"--trainer.default_root_dir={tmp_path / 'run'}"]
    for source, extra, more in (("train", ["--holdout", "4"], ["--model.init_args.optimizer.warmup_steps=0"]), ("pairs.csv", [], [])):
        main([str(tmp_path / source), str(tmp_path / "out" / source), "--per-shard", "4", *extra])
        words = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert words[:3] == ["python", "train.py", "fit"]
        run = train.main([*words[2:], *small, *more])
        assert run.trainer.global_step == 1
        small[-1] += "2"
