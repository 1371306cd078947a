"""Folders and zips of images: the same data either way, damage counted, mistakes named."""

from __future__ import annotations

import io
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aft.batch import ClassData, EvaluationSet
from aft.errors import ConfigError, DataError
from datamodules import ImageFolder
from datamodules.sources import ZipSource


def damage(file: Path) -> None:
    """Cuts a file in half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_zip_equals_folder(make_folder, zipped) -> None:
    """Same images, labels, numbers and names, whatever the order of the zip's members."""
    folder = make_folder()
    one, other = (ImageFolder(str(path)).evaluation_set("train") for path in (folder, zipped(folder)))
    rows = range(len(one))
    assert torch.equal(one.batch(rows).images, other.batch(rows).images)
    assert torch.equal(one.labels_N, other.labels_N) and torch.equal(one.index_N, other.index_N)
    assert one.class_names == other.class_names == ("cat", "dog", "sea horse")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "jpeg"])
@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_pixels_are_pils(make_folder, ending: str, cache_bytes: int) -> None:
    """An image is PIL's RGB decode divided by 255, float32 in [0, 1], whether held in memory or not."""
    folder = make_folder(ending=ending, size=(9, 7))
    images = ImageFolder(str(folder), cache_bytes=cache_bytes).evaluation_set("train").images
    for position, file in enumerate(sorted(folder.rglob(f"*.{ending}"))):
        want = torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1).float() / 255
        assert images[position].dtype == torch.float32 and images[position].shape == (3, 7, 9)
        assert torch.equal(images[position], want)


def test_it_is_class_data(make_folder) -> None:
    """The Protocol that methods read; one list a validation loader."""
    data = ImageFolder(str(make_folder()), holdout=3)
    assert isinstance(data, ClassData)
    assert data.val_class_lists == ("holdout",) and len(data.val_dataloader()) == 1
    assert data.class_lists == {"train": ("cat", "dog", "sea horse"), "holdout": ("cat", "dog", "sea horse")}
    assert data.class_phrases == (("cat",), ("dog",), ("sea horse",)) and data.templates == ("a photo of a {}.",)
    without = ImageFolder(str(data.paths["train"]))
    assert without.val_dataloader() == [] and without.val_class_lists == ()


def test_holdout_is_disjoint_balanced_nested_and_stable(make_folder) -> None:
    """Held-out images are never trained on; the choice depends on the images' numbers only: another seed, later, trains on none of them."""
    folder = str(make_folder(per_class=10))

    def parts(holdout: int, **settings: object) -> tuple[EvaluationSet, EvaluationSet]:
        data = ImageFolder(folder, holdout=holdout, **settings)
        return data.evaluation_set("holdout"), data.evaluation_set("train")

    held, trained = parts(9)
    assert not set(held.index_N.tolist()) & set(trained.index_N.tolist()) and len(held) + len(trained) == 30
    assert held.labels_N.bincount().tolist() == [3, 3, 3]
    assert torch.equal(held.index_N, parts(9)[0].index_N) and set(parts(4)[0].index_N.tolist()) < set(held.index_N.tolist())
    assert torch.equal(held.index_N, parts(9, seed=1)[0].index_N)
    cats = set(held.index_N[held.labels_N == 0].tolist())
    fewer = parts(6, train_classes=["dog", "cat"])[0]
    assert set(fewer.index_N[fewer.labels_N == 1].tolist()) == cats
    loader = ImageFolder(folder, holdout=9, batch_size=4).val_dataloader()[0]
    assert [len(batch.index) for batch in loader] == [4, 4, 1]
    assert torch.equal(torch.cat([batch.index for batch in loader]), held.index_N)
    assert not any(set(batch.index.tolist()) & set(held.index_N.tolist())
                   for batch in ImageFolder(folder, holdout=9, batch_size=7).train_dataloader())


def test_a_damaged_image_moves_no_other_choice(make_folder) -> None:
    """The choice hashes stable numbers: with one file lost, the other held-out images stay, and its own class fills one place."""
    folder = make_folder(per_class=20, ending="jpg")
    before = set(ImageFolder(str(folder), holdout=15).evaluation_set("holdout").index_N.tolist())
    lost = min(before)
    damage(sorted(folder.rglob("*.jpg"))[lost])
    with pytest.warns(UserWarning, match="1 of 60"):
        after = set(ImageFolder(str(folder), holdout=15, max_bad_share=0.1).evaluation_set("holdout").index_N.tolist())
    assert len(after - before) == 1 and before - after == {lost}


def test_train_classes_are_renumbered_and_the_test_set_keeps_all(make_folder) -> None:
    """Labels are places in class_lists['train'], in the order given; the evaluation set has every class."""
    folder, test = make_folder(), make_folder(name="test")
    data = ImageFolder(str(folder), str(test), train_classes=["sea horse", "cat"], batch_size=8, augment="none")
    assert data.class_lists["train"] == ("sea horse", "cat") and data.class_phrases == (("sea horse",), ("cat",))
    batch = next(iter(data.train_dataloader()))
    assert {(label, index // 4) for label, index in zip(batch.labels.tolist(), batch.index.tolist(), strict=True)} == {(0, 2), (1, 0)}
    whole = data.evaluation_set("test")
    assert whole.class_names == ("cat", "dog", "sea horse") and whole.labels_N.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert whole.select(["dog"], "new").index_N.tolist() == [4, 5, 6, 7]
    with pytest.raises(DataError, match="did you mean 'cat'"):
        ImageFolder(str(folder), train_classes=["cats", "dog"]).setup()
    with pytest.raises(DataError, match="given twice"):
        ImageFolder(str(folder), train_classes=["cat", "cat"]).setup()
    with pytest.raises(DataError, match="two classes or more"):
        ImageFolder(str(folder), train_classes=["cat"]).setup()


@pytest.mark.parametrize("size", [(8, 8), (120, 120)])
def test_truncated_images_are_counted_and_skipped(make_folder, size: tuple[int, int]) -> None:
    """A damaged file is named in one warning; the others keep their numbers and labels. Also in threads (large images)."""
    folder = make_folder(ending="jpg", size=size)
    damage(folder / "cat" / "000.jpg")
    (folder / "dog" / "001.jpg").write_bytes(b"")
    data = ImageFolder(str(folder), max_bad_share=0.5)
    with pytest.warns(UserWarning, match=r"2 of 12 images are damaged: .*cat/000.jpg .*dog/001.jpg"):
        found = data.evaluation_set("train")
    assert found.index_N.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11] and found.labels_N.tolist() == [0] * 3 + [1] * 3 + [2] * 4
    want = torch.from_numpy(np.asarray(Image.open(folder / "dog" / "003.jpg")).copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(found.batch([5]).images[0], want)


def test_a_zip_member_that_fails_its_checksum_is_damaged(make_folder, zipped) -> None:
    """Bit rot inside a zip is a damaged image, not an end of the run."""
    folder = make_folder()
    inside = (folder / "cat" / "002.png").read_bytes()
    path = zipped(folder)
    path.write_bytes(path.read_bytes().replace(inside, inside[:-20] + bytes(20)))
    with pytest.warns(UserWarning, match=r"1 of 12 images are damaged: .*cat/002.png \(Bad CRC"):
        assert ImageFolder(str(path), max_bad_share=0.1).evaluation_set("train").index_N.tolist() == [0, 1, *range(3, 12)]


def test_each_process_opens_the_zip_for_itself(make_folder, zipped, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked worker shares the parent's file offset, and would now and then read another member's bytes."""
    source = ZipSource(zipped(make_folder()))
    opened = source._zip()
    assert source._zip() is opened
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert source._zip() is not opened


def test_too_many_damaged_images_abort(make_folder) -> None:
    """1 of 12 is above the default share of 0.01."""
    folder = make_folder(ending="jpg")
    damage(folder / "cat" / "000.jpg")
    with pytest.raises(DataError, match=r"1 of 12 images are damaged.*raise max_bad_share"):
        ImageFolder(str(folder)).setup("fit")


def test_uncached_damage_names_the_file(make_folder) -> None:
    """Without the cache only headers are checked at the start; what turns up later stops with the file's name."""
    folder = make_folder(ending="jpg", size=(64, 64))
    damage(folder / "cat" / "001.jpg")
    (folder / "cat" / "000.jpg").write_bytes(b"no image")
    data = ImageFolder(str(folder), cache_bytes=0, max_bad_share=0.1)
    with pytest.warns(UserWarning, match="cat/000.jpg"):
        images = data.evaluation_set("train").images
    with pytest.raises(DataError, match=r"cat/001.jpg cannot be decoded"):
        images[0]


def test_decompression_bombs_count_as_damaged(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image above PIL's limit is refused by its header, also between the limit and twice of it, where PIL only warns."""
    folder = make_folder()
    Image.new("RGB", (10, 10)).save(folder / "dog" / "000.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.warns(UserWarning, match="1 of 12 .*10 x 10 pixels are more than 64"):
            assert len(ImageFolder(str(folder), max_bad_share=0.1).evaluation_set("train")) == 11


def test_other_formats_are_not_decoded(make_folder) -> None:
    """Only the four formats are read, whatever a file's name says: a GIF called .png is damaged."""
    folder = make_folder()
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "GIF")
    (folder / "dog" / "000.png").write_bytes(data.getvalue())
    with pytest.raises(DataError, match="1 of 12"):
        ImageFolder(str(folder)).setup("fit")


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_sizes_must_agree_or_be_made_to(make_folder, cache_bytes: int) -> None:
    """Several sizes without image_size: an error with the remedy; with it: short side resized, centre cropped."""
    folder = make_folder()
    Image.new("RGB", (20, 10), (255, 0, 0)).save(folder / "dog" / "002.png")
    with pytest.raises(DataError, match=r"dog/002.png is 20 x 10 pixels, others are 8 x 8: set image_size"):
        ImageFolder(str(folder), cache_bytes=cache_bytes).setup("fit")
    images = ImageFolder(str(folder), cache_bytes=cache_bytes, image_size=5).evaluation_set("train").images
    assert all(image.shape == (3, 5, 5) for image in (images[0], images[6]))
    assert torch.equal(images[6][0], torch.ones(5, 5))


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_memory_is_used_only_when_the_set_fits(make_folder, cache_bytes: int) -> None:
    """12 images of 3 x 8 x 8 bytes are held under a limit of 1 MiB, not under 0."""
    store = ImageFolder(str(make_folder()), cache_bytes=cache_bytes).store("train")
    assert (store.pixels_NCHW is not None) == (cache_bytes > 0)


def test_unusable_folders_say_why(make_folder, zipped, tmp_path: Path) -> None:
    """Missing, empty, no zip, one class, a class without images, other classes in the test set."""
    folder = make_folder()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    shutil.copytree(folder / "cat", tmp_path / "single" / "cat")
    shutil.copytree(folder, tmp_path / "hollow")
    (tmp_path / "hollow" / "eel").mkdir()
    shutil.copytree(folder, tmp_path / "other")
    shutil.move(tmp_path / "other" / "cat", tmp_path / "other" / "cow")
    for train, test, message in (
        (tmp_path / "absent", None, "does not exist"), (tmp_path / "nothing", None, "holds no image"),
        (tmp_path / "broken.zip", None, "cannot be read as a zip"), (tmp_path / "single", None, "one class folder only"),
        (tmp_path / "hollow", None, r"1 class folders of .* hold no image \(eel\)"),
        (zipped(tmp_path / "hollow"), None, r"hold no image \(eel\)"),
        (folder, tmp_path / "other", "only in train: cat; only in test: cow"),
    ):
        with pytest.raises(DataError, match=message):
            ImageFolder(str(train), test and str(test)).setup("fit")
    with pytest.raises(DataError, match="has no test images"):
        ImageFolder(str(folder)).evaluation_set("test")
    with pytest.raises(DataError, match="holdout = 0"):
        ImageFolder(str(folder)).evaluation_set("holdout")


def test_junk_is_no_image(make_folder) -> None:
    """Hidden folders and files, archivers' folders and other endings are left out."""
    folder = make_folder()
    for path in (".cache/a.png", "__MACOSX/cat/._000.png", "cat/._000.png", "cat/Thumbs.db", "readme.png"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"junk")
    assert len(ImageFolder(str(folder)).evaluation_set("train")) == 12


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"padding": -1}, {"augment": "spin"}, {"templates": ("a photo",)},
                                     {"templates": ()}, {"padding": 8, "augment": "crop_flip"}, {"holdout": 12}, {"seed": -1}])
def test_settings_out_of_range_are_errors(make_folder, setting: dict[str, object]) -> None:
    """What cannot work is said before training."""
    with pytest.raises(ConfigError):
        ImageFolder(str(make_folder()), **setting).setup("fit")
