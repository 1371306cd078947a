"""The zero-shot suite: each set in its own layout on the disk, and what is said and done where something is missing or wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from aft.batch import SuiteData
from aft.clip.prompts import fill_templates
from aft.errors import ConfigError, DataError
from datamodules import ZeroShotSuite
from datamodules.images import ImageStore
from datamodules.zero_shot_table import DATA, content, table, verified
from tests.zero_shot_sets import BUILD, class_of, clip_benchmark, folders, given_folders, known, put

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:class names that stand for more than one class")


def the_one(root: Path, name: str, **settings):
    """A set that is asked for by name."""
    (found,) = ZeroShotSuite(str(root), sets=[name], image_size=8, **settings).evaluation_sets("test")
    return found


def true_names(found) -> list[tuple[str, int]]:
    """For each image the name that its label means, and the class that its picture is of."""
    return [(found.class_names[int(label)], class_of(found.batch([row]).images[0])) for row, label in enumerate(found.labels_N)]


@pytest.mark.parametrize("name", table())
def test_each_set_in_its_own_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image has the label whose name is its class's; the split is the table's, and single and ensemble prompts are its own."""
    names, record = BUILD[name](tmp_path, monkeypatch), table()[name]
    found = the_one(tmp_path, name)
    assert len(names) == len(found.class_names) == record.classes and len(set(found.index_N.tolist())) == len(found) >= record.classes
    assert all(said == names[number] for said, number in true_names(found))
    assert (found.name, found.split, found.templates) == (name, record.split, (record.single,))
    prompts = fill_templates(found.class_names, the_one(tmp_path, name, templates="ensemble").templates)
    assert len(prompts[0]) == len(content("templates.json")[record.ensemble])


@pytest.mark.parametrize(("name", "place", "form"), [("eurosat", "wds/eurosat", "webp"), ("caltech101", "wds_vtab-caltech101", "jpg"),
                                                     ("imagenet", "wds/imagenet1k", "webp"), ("cifar10", "wds/cifar10", "png")])
def test_shards_of_clip_benchmark(name: str, place: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels mean their own list of names, whose order may be another one than ours; that is said. Theirs is a test split."""
    names = [f"c_{number}" for number in range(10)] if name == "cifar10" else known(name)
    names = sorted([*names, "background"]) if name == "caltech101" else names
    clip_benchmark(tmp_path / place, names, side=table()[name].side or 8, form=form)
    found = the_one(tmp_path, name)
    assert len(found) == len(found.class_names) == table()[name].classes
    assert all(said == names[number].replace("_", " ") for said, number in true_names(found))
    assert len(set(found.index_N.tolist())) == len(found)
    assert found.split == ("val" if name == "imagenet" else "test")
    said = capsys.readouterr().out
    assert ("class names are its own, such as" in said) == (name == "caltech101")
    assert ("left out as no class: background, 1 images" in said) == (name == "caltech101")
    assert ("; the whole set has" in said) == (table()[name].split == "all")


def test_shards_and_zips_in_the_place_of_folders(tmp_path: Path, make_shards, make_folder, zipped) -> None:
    """``ID/test`` may be shards of ours, and ``ID/test.zip`` a zip."""
    (tmp_path / "pcam").mkdir()
    make_shards((3, 3)).rename(tmp_path / "pcam" / "test")
    with pytest.raises(DataError, match="pcam: images of .*test are 8 x 8 pixels where PatchCamelyon has 96 x 96"):
        the_one(tmp_path, "pcam")
    (tmp_path / "cifar10").mkdir()
    zipped(make_folder(tuple(f"c{n}" for n in range(10)), size=(32, 32))).rename(tmp_path / "cifar10" / "test.zip")
    assert len(the_one(tmp_path, "cifar10")) == 40


def test_the_first_place_counts_and_the_others_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders before shards."""
    BUILD["eurosat"](tmp_path, pytest.MonkeyPatch())
    clip_benchmark(tmp_path / "wds" / "eurosat", known("eurosat"), side=64)
    assert the_one(tmp_path, "eurosat").split == "all"
    said = capsys.readouterr().out
    assert f"not read: {tmp_path / 'wds' / 'eurosat'}" in said and "not all, or others: EuroSAT, RGB has 27,000" in said


def test_what_torchvision_fetches_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below ``torchvision``, where a download puts it; nothing is fetched unless asked, nor where it is there."""
    fetched = []
    monkeypatch.setattr(torchvision.datasets.DTD, "_download", lambda self: fetched.append(self.root) or BUILD["dtd"](
        Path(self.root), monkeypatch))
    with pytest.raises(DataError, match="the set dtd is asked for, but is not below"):
        the_one(tmp_path, "dtd")
    assert fetched == []
    for _ in range(2):
        assert len(the_one(tmp_path, "dtd", download=True)) == 47
    assert fetched == [str(tmp_path / "torchvision")] and len(the_one(tmp_path, "dtd")) == 47


def test_the_order_does_not_depend_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision lists SUN397 as the disk does; numbers of samples, and so the images of a card, must not."""
    BUILD["sun397"](tmp_path, monkeypatch)
    before, real = the_one(tmp_path, "sun397"), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(sorted(real(self, pattern))))
    after = the_one(tmp_path, "sun397")
    assert torch.equal(before.labels_N, after.labels_N) and true_names(before) == true_names(after)
    assert [before.images.source.name(place) for place in range(3)] == [after.images.source.name(place) for place in range(3)]


def test_the_suite_goes_on_without_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In the order of the table; each missing set has a line with what to put where, and what is wrong has one too. All is counted."""
    for name in ("dtd", "cifar10", "food101"):
        BUILD[name](tmp_path, monkeypatch)
    (tmp_path / "food-101" / "meta" / "test.json").unlink()
    folders(tmp_path / "eurosat" / "EuroSAT_RGB", given_folders("eurosat"), side=64)
    suite = ZeroShotSuite(str(tmp_path), image_size=8)
    assert isinstance(suite, SuiteData) and [one.name for one in suite.evaluation_sets("test")] == ["cifar10", "dtd"]
    said = capsys.readouterr().out
    assert "zero-shot suite: 2 of 21 sets are measured, 17 are not there, 2 cannot be read." in said
    assert "  stl10: stl10_binary/{train_X.bin" in said and "(from https://cs.stanford.edu/~acoates/stl10/)" in said
    assert "food101: torchvision's Food101 cannot be opened" in said and f"Found in {tmp_path / 'food-101'}: images/, meta/" in said
    wrong = next(line for line in said.splitlines() if line.startswith("  eurosat: "))
    assert f"Found in {tmp_path / 'eurosat'}: EuroSAT_RGB/. Expected below {tmp_path}: eurosat/2750/CLASS/*.jpg, or eurosat/test" in wrong
    assert {one.id for one in suite.missing if one.unreadable} == {"food101", "eurosat"} and len(suite.missing) == 19


def test_sets_that_are_named_must_all_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is missing, or cannot be read, is an error also beside others that can."""
    for name in ("dtd", "food101"):
        BUILD[name](tmp_path, monkeypatch)
    with pytest.raises(DataError, match="the set eurosat is asked for, but is not below .*: put there eurosat/2750/CLASS"):
        ZeroShotSuite(str(tmp_path), sets=["dtd", "eurosat"]).evaluation_sets("test")
    (tmp_path / "food-101" / "meta" / "test.json").unlink()
    with pytest.raises(DataError, match="food101: torchvision's Food101 cannot be opened"):
        ZeroShotSuite(str(tmp_path), sets=["dtd", "food101"]).evaluation_sets("test")


def test_an_empty_folder_is_an_error_with_all_that_could_be_there(tmp_path: Path) -> None:
    """Nothing to measure."""
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="no set of the zero-shot suite can be read below .*") as told:
            ZeroShotSuite(str(root)).evaluation_sets("test")
        assert all(f"\n  {name}: " in str(told.value) for name in table())


def rename_folder(root: Path) -> None:
    """One class folder of ImageNet-A under another name."""
    (root / "imagenet-a" / given_folders("imagenet_a")[0]).rename(root / "imagenet-a" / "n99999999")


def remove_folder(root: Path) -> None:
    """One class folder of Caltech-101 away."""
    shutil.rmtree(root / "caltech101" / "101_ObjectCategories" / "Faces")


def empty_folder(root: Path) -> None:
    """A class folder without an image."""
    shutil.rmtree(root / "imagenet-a" / given_folders("imagenet_a")[5])
    (root / "imagenet-a" / given_folders("imagenet_a")[5]).mkdir()


def other_names(root: Path) -> None:
    """A file of names that lacks a folder."""
    put(root / "eurosat" / "classes.json", json.dumps({name: name for name in given_folders("eurosat")[1:]}))


def half_the_names(root: Path) -> None:
    """Names of 36 breeds in the annotations."""
    path = root / "oxford-iiit-pet" / "annotations" / "test.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def larger_images(root: Path) -> None:
    """Tiny-ImageNet at 64 px."""
    folders(root / "tiny-imagenet-32" / "val", [f"n{number:08d}" for number in range(200)], "0001.webp", 64)


def damage(root: Path) -> None:
    """Three of 47 images are text."""
    for path in sorted((root / "dtd" / "dtd" / "images").rglob("*.jpg"))[:3]:
        path.write_bytes(b"\xff\xd8 no image")


def unlisted_class(root: Path) -> None:
    """A folder that the list of classes does not name."""
    path = root / "SUN397" / "ClassName.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def high_label(root: Path) -> None:
    """A label that no class has."""
    from scipy.io import savemat

    labels = [*range(1, 196), 197]
    notes = np.array([(label, f"{place:05d}.jpg") for place, label in enumerate(labels, 1)], dtype=[("class", "O"), ("fname", "O")])
    savemat(root / "stanford_cars" / "cars_test_annos_withlabels.mat", {"annotations": notes})


WRONG = [
    ("stanford_cars", high_label, "has the labels .196., outside of its 196 classes"),
    ("imagenet_a", rename_folder, "are not those of ImageNet-A: missing n01498041; unknown n99999999. Name other folders in a classes."),
    ("caltech101", remove_folder, "has 100 class folders where Caltech-101 has 101"),
    ("imagenet_a", empty_folder, "1 class folders of .* hold no image .n01614925."),
    ("eurosat", other_names, "classes file .*classes.json' names no class for 1 folders .AnnualCrop."),
    ("oxford_pets", half_the_names, "has 36 classes where Oxford-IIIT Pet has 37"),
    ("tiny_imagenet32", larger_images, "are 64 x 64 pixels where Tiny-ImageNet at 32 px has 32 x 32"),
    ("sun397", unlisted_class, "torchvision's SUN397 cannot be opened in .* .'place_000/indoor'."),
    ("dtd", damage, "3 of 47 images are damaged: .* At most a share of 0.01 is skipped"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_what_does_not_fit_is_refused_and_named(name, spoil, message, tmp_path, monkeypatch, capsys) -> None:
    """An error where the set is asked for; else it is counted as one that cannot be read."""
    BUILD[name](tmp_path, monkeypatch)
    the_one(tmp_path, name)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        the_one(tmp_path, name)
    with pytest.raises(DataError, match=f"no set of the zero-shot suite can be read(.|\n)*  {name}: .*{message}"):
        ZeroShotSuite(str(tmp_path)).evaluation_sets("test")


def test_a_package_that_torchvision_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flowers-102 is read with scipy; without it the set cannot be read, and the others can."""
    for name in ("flowers102", "dtd"):
        BUILD[name](tmp_path, monkeypatch)
    for module in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    suite = ZeroShotSuite(str(tmp_path), image_size=8)
    assert [one.name for one in suite.evaluation_sets("test")] == ["dtd"]
    assert [one.id for one in suite.missing if one.unreadable and "scipy" in one.reason] == ["flowers102"]


def test_a_few_damaged_images_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And said; the others keep their numbers."""
    BUILD["dtd"](tmp_path, monkeypatch)
    damage(tmp_path)
    with pytest.warns(UserWarning, match="3 of 47 images are damaged"):
        found = the_one(tmp_path, "dtd", max_bad_share=0.1)
    assert found.index_N.tolist() == list(range(3, 47)) and all(said == f"rough {number:03d}" for said, number in true_names(found))


WRONG_SHARDS = [
    (lambda place: (place / "test" / "1.tar").unlink(), "nshards.txt says 2 shards; missing: 1.tar"),
    (lambda place: (place / "test" / "nshards.txt").write_text("two"), "is not laid out as CLIP_benchmark's shards .invalid literal"),
    (lambda place: (place / "classnames.txt").unlink(), "is not laid out as CLIP_benchmark's shards .*classnames.txt"),
    (lambda place: (place / "classnames.txt").write_text("\n".join(f"c{n}" for n in range(9))), "class 9 is outside the list of 9 classes"),
    (lambda place: (place / "classnames.txt").write_text("\n".join(f"c{n}" for n in range(11))), "has 11 classes where CIFAR-10 has 10"),
    (lambda place: (place / "test" / "0.tar").write_bytes(b"no tar" * 200), "0.tar cannot be read as a tar"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG_SHARDS)
def test_shards_that_do_not_fit_are_refused_and_named(spoil, message: str, tmp_path: Path) -> None:
    """With what was found and what is expected."""
    spoil(clip_benchmark(tmp_path / "wds" / "cifar10", [f"c{n}" for n in range(10)], side=32))
    with pytest.raises(DataError, match=f"cifar10: .*{message}.* Found in .*wds/cifar10: .* Expected below .*wds/cifar10"):
        the_one(tmp_path, "cifar10")


@pytest.mark.parametrize(("settings", "message"), [
    ({"sets": ["cifar-10"]}, "did you mean 'cifar10'"), ({"sets": []}, "sets is empty"), ({"templates": "many"}, "unknown templates"),
    ({"download": True}, "fetches the sets that are named"), ({"image_size": 0}, "image_size = 0 is too small")])
def test_settings_are_checked(settings, message: str) -> None:
    """Before anything is read."""
    with pytest.raises(ConfigError, match=message):
        ZeroShotSuite(**settings)


def test_there_are_test_images_alone(tmp_path: Path) -> None:
    """A suite trains and chooses nothing."""
    with pytest.raises(ConfigError, match="split = 'train': the zero-shot suite has test images alone"):
        ZeroShotSuite(str(tmp_path)).evaluation_sets("train")


def test_large_sets_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond ``cache_bytes`` each access decodes; the pixels are the same."""
    BUILD["dtd"](tmp_path, monkeypatch)
    held, read = the_one(tmp_path, "dtd"), the_one(tmp_path, "dtd", cache_bytes=0)
    assert isinstance(held.images, ImageStore) and held.images.pixels_NCHW is not None and read.images.pixels_NCHW is None
    assert torch.equal(held.batch(range(47)).images, read.batch(range(47)).images)


def test_a_changed_list_is_noticed(tmp_path: Path) -> None:
    """A name or template that differs from the shipped one changes figures."""
    for path in DATA.iterdir():
        shutil.copy(path, tmp_path)
    assert verified(tmp_path, "templates.json") == content("templates.json")
    path = tmp_path / "templates.json"
    path.write_text(path.read_text().replace("a photo of a {}.", "a photo of {}."))
    with pytest.raises(DataError, match="templates.json is not the file that sha256.json names"):
        verified(tmp_path, "templates.json")
    path.unlink()
    with pytest.raises(DataError, match="templates.json cannot be read"):
        verified(tmp_path, "templates.json")


def test_the_table_is_whole() -> None:
    """Ids, names, templates and families of every record fit together."""
    lists = content("templates.json")
    for record in table().values():
        assert record.single.count("{}") == 1 and record.split in ("test", "val", "all") and record.layout and record.url
        assert all(template.count("{}") == 1 for template in lists[record.ensemble])
        assert record.given_names is None or len(record.given_names) == record.classes
        assert record.family in table() and (record.folders or record.torchvision)
        assert record.torchvision is None or hasattr(torchvision.datasets, record.torchvision.kind)
    assert {record.ensemble for record in table().values()} == set(lists) and len(table()) == 21
    assert {record.names for record in table().values()} - {None} == set(content("names.json"))


def test_names_and_templates_are_those_of_the_packages() -> None:
    """ImageNet's as in open_clip; its WordNet ids, in label order, and those of -A and -R as in timm; flowers in torchvision's order."""
    import timm.data
    from open_clip import zero_shot_metadata as shipped

    def synsets(name: str) -> list[str]:
        """A list of timm's."""
        return (Path(timm.data.__file__).parent / "_info" / f"{name}_synsets.txt").read_text().split()

    names = content("names.json")
    assert list(names["imagenet"].items()) == list(zip(synsets("imagenet"), shipped.IMAGENET_CLASSNAMES, strict=True))
    assert names["imagenet_v2"] == {str(place): name for place, name in enumerate(shipped.IMAGENET_CLASSNAMES)}
    for part in ("imagenet_a", "imagenet_r"):
        assert names[part] == {wnid: names["imagenet"][wnid] for wnid in sorted(synsets(part))} and list(names[part]) == sorted(names[part])
    assert content("templates.json")["imagenet"] == [template("{}") for template in shipped.OPENAI_IMAGENET_TEMPLATES]
    pairs = list(zip(names["flowers102"], torchvision.datasets.Flowers102.classes, strict=True))
    other = [(ours, theirs) for ours, theirs in pairs if ours.replace("-", " ") != theirs.replace("-", " ")]
    assert other == [("pink and yellow dahlia", "pink-yellow dahlia?"), ("air plant", "ball moss")]


@pytest.mark.skipif(not (ROOT / "data" / "cifar10" / "test.zip").exists(), reason="data/cifar10 is not here: make data DATA=FOLDER")
def test_the_sets_at_hand_are_the_ones_on_the_cards() -> None:
    """The suite's CIFAR-10 and Tiny-ImageNet are, to the sample and the prompt, those that results/cards were measured on."""
    from aft.evaluation.origin import data_block
    from aft.evaluation.subsets import first

    for found in ZeroShotSuite(str(ROOT / "data"), sets=["cifar10", "tiny_imagenet32"]).evaluation_sets("test"):
        (card,) = (json.loads(path.read_text()) for path in (ROOT / "results/cards/miniclip32").glob(f"{found.name}-*-clean-*.json"))
        assert data_block(first(found)) == card["data"]


def test_the_page_says_what_the_table_says() -> None:
    """A row a set in docs/zero_shot_suite.md, with its images, classes, split and licence."""
    text = (ROOT / "docs" / "zero_shot_suite.md").read_text()
    for record in table().values():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{record.id}` |"))
        assert f"| {record.images:,} | {record.classes:,} | {record.split}" in row and row.endswith(f"| {record.licence} |")
