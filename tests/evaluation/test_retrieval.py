"""Laws of retrieval: every true caption counts as right, recall is what counting gives, and the runner knows nothing of it."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as command
from aft.attacks import objectives
from aft.batch import CaptionedSet
from aft.cards import read_arrays
from aft.errors import AftError, ConfigError, DataError
from aft.evaluation import Cell, Place, Retrieval, evaluate, first, plan
from aft.evaluation.judge import cell_under
from aft.evaluation.retrieval import Sight, image_ranks, one_right
from aft.evaluation.runner import card_path

CAPTIONS = [["an ant"], ["a bee", "bees"], ["a cow", "an ant"], ["a dog", "the dog", "dogs"], ["an ant"]]


@pytest.fixture
def pairs(data) -> CaptionedSet:
    """Twenty images: some have several captions, and some captions are several images'."""
    with_number = [[f"{text} {row}" if row > 9 else text for text in CAPTIONS[row % 5]] for row in range(20)]
    return CaptionedSet.of("pairs", "test", data.images, torch.arange(20) + 7, with_number)


@pytest.fixture
def sound(model, pairs) -> CaptionedSet:
    """The same gallery over other captions: three quarters of the images have the text that the model says, and two more."""
    texts, context = pairs.class_names, Retrieval((1,)).prepare(model, pairs)
    with torch.no_grad():
        said = Retrieval((1,)).forward(model, pairs.images[:20], context).logits_nT.argmax(1).tolist()
    first_of = [[text if row % 4 else (text + 5) % len(texts), row, len(texts) - 1 - row] for row, text in enumerate(said)]
    captions = [[texts[place] for place in dict.fromkeys(places)] for places in first_of]
    return CaptionedSet.of("pairs", "test", pairs.images, pairs.index_N, captions)


def cell_for(model, pairs, name="apgd", eps=0.02, recall_at=(1, 3)) -> Cell:
    """On all images, with few steps."""
    task = Retrieval(recall_at)
    protocol = plan(name, eps=eps, steps=4, targets=2, classes=task.choices(pairs))
    return Cell(model, pairs, protocol, task=task)


def test_equal_texts_are_one_and_truth_goes_by_text(pairs):
    """Each text once; a caption of several images is true of all of them; a part has the gallery of its own images."""
    texts = pairs.class_names
    assert len(set(texts)) == len(texts) and len(pairs) == 20
    ant = texts.index("an ant")
    assert pairs.truth(range(20))[:, ant].nonzero().flatten().tolist() == [0, 2, 4, 5, 7, 9]
    assert [len(true) for true in pairs.true_texts[:5]] == [1, 2, 2, 3, 1]
    part = pairs.take(torch.tensor([3, 0]))
    assert sorted(part.class_names) == ["a dog", "an ant", "dogs", "the dog"] and part.index_N.tolist() == [10, 7]
    assert torch.equal(part.batch([0]).images[0], pairs.images[3])
    some, more = first(pairs, 6), first(pairs, 12)
    assert torch.equal(some.index_N, more.index_N[:6]) and set(some.class_names) <= set(more.class_names)


@pytest.mark.parametrize("name", ["ce", "margin", "dlr", "dlr_targeted"])
def test_losses_count_every_true_text_as_right(name):
    """Against the formula in float64, text by text: true texts but the nearest are not there at all."""
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = torch.zeros(6, 9, dtype=torch.bool)
    for row, true in enumerate([[0], [1, 2], [3, 4, 5], [8], [0, 8], [2, 5, 7]]):
        truth[row, true] = True
    target = torch.tensor([4, 4, 7, 1, 3, 0])
    found = Retrieval.losses[name](Sight(logits, logits), truth, *([target] if name == "dlr_targeted" else []))
    for row in range(6):
        wrong, right = logits[row, ~truth[row]], logits[row, truth[row]].max()
        top = torch.cat([wrong, right[None]]).sort(descending=True).values
        expected = {
            "ce": torch.cat([wrong, right[None]]).exp().sum().log() - right, "margin": wrong.max() - right,
            "dlr": (wrong.max() - right) / (top[0] - top[2] + 1e-12),
            "dlr_targeted": (logits[row, target[row]] - right) / (top[0] - (top[2] + top[3]) / 2 + 1e-12),
        }[name]  # fmt: skip
        assert found[row] == pytest.approx(float(expected), rel=1e-10)


def test_with_one_caption_an_image_it_is_classification():
    """The losses are those over T classes, to rounding."""
    logits, labels = torch.randn(5, 7, dtype=torch.float64), torch.tensor([3, 0, 6, 6, 2])
    truth = torch.nn.functional.one_hot(labels, 7).bool()
    for name in ("ce", "margin", "dlr"):
        assert torch.allclose(Retrieval.losses[name](Sight(logits, logits), truth), getattr(objectives, name)(logits, labels))


def test_an_attack_breaks_an_image_only_by_a_wrong_text(model, pairs):
    """Another true text in front is no success, and no targeted attack aims at one."""
    task, rows = Retrieval((1,)), torch.arange(20)
    context, truth = task.prepare(model, pairs), pairs.truth(range(20))
    objective = task.objective(model, context, truth, "ce")
    seen = task.forward(model, pairs.images[:20], context)
    assert torch.equal(objective(pairs.images[:20], rows).broken_n, ~task.score(seen, truth))
    aims = objective.wrong_classes(pairs.images[:20], rows, task.choices(pairs) - 1)
    assert not truth.gather(1, aims).any() and task.choices(pairs) == 1 + len(pairs.class_names) - 3
    others = task.objective(model, context, truth | torch.nn.functional.one_hot(seen.logits_nT.argmax(1), truth.shape[1]).bool(), "ce")
    assert not others(pairs.images[:20], rows).broken_n.any()


@pytest.mark.parametrize("several", [False, True])
def test_ranks_of_images_are_what_counting_gives(several):
    """For each text, image by image in float64; a tie with a wrong image counts against it."""
    random = np.random.default_rng(0)
    texts, images = random.normal(size=(6, 4)), random.normal(size=(8, 4))
    images[3] = images[2]
    true = [(0,), (1,), (2,), (3,), (4,), (5,), (0, 1) if several else (0,), (2,)]
    ranks = image_ranks(texts, images, true)
    for text in range(6):
        near = images @ texts[text]
        best = max(near[image] for image in range(8) if text in true[image])
        assert ranks[text] == sum(near[image] >= best for image in range(8) if text not in true[image])


def test_a_model_that_says_the_same_of_everything_finds_nothing(make, pairs):
    """All texts are equally near: no recall, where counting ties as hits would say 100 %."""
    model = make[0]()
    model.visual[-1].weight.data.zero_()
    model.clip.text.weight.data.fill_(1.0)
    assert evaluate_clean(model, pairs)["clean_accuracy"] == 0


def evaluate_clean(model, pairs):
    """Its card without an attack, from verdicts alone."""
    from aft.evaluation.judge import Judge, scoring
    from aft.evaluation.runner import summarise

    cell = cell_for(model, pairs, "clean")
    with scoring(model):
        return summarise(cell, Judge(cell)(range(20))[0], np.zeros(3))


def test_the_card_says_recall_both_ways(model, sound, tmp_path):
    """Recall at 1 is the verdict, at larger k it is larger; with n, standard error and chance; text to image from stored embeddings."""
    pairs, cell = sound, cell_for(model, sound)
    card = evaluate(cell, tmp_path, batch_size=7)
    seen, recall = read_arrays(card_path(tmp_path, "model", cell).with_suffix(".npz")), card["metrics"]["recall"]
    assert card["task"] == "retrieval" and card["verdict"]["failed_checks"] == []
    assert np.array_equal(seen["clean_rank"] == 0, seen["clean"]) and np.array_equal(seen["rank"] == 0, seen["right"][:, -1])
    to_text = recall["image_to_text"]
    assert (to_text["recall_at_1"]["clean"], to_text["recall_at_1"]["attacked"]) == (card["clean_accuracy"], card["robust_accuracy"])
    assert to_text["recall_at_1"]["clean_standard_error"] == card["standard_error"]["clean"]
    assert 0 < card["robust_accuracy"] < card["clean_accuracy"] < 1 and to_text["recall_at_3"]["clean"] >= to_text["recall_at_1"]["clean"]
    texts = cell.task.prepare(model, pairs).text_KD.numpy()
    for state, column in (("clean", "clean_embedding"), ("attacked", "embedding")):
        ranks = image_ranks(texts, seen[column], pairs.true_texts)
        assert recall["text_to_image"]["recall_at_3"][state] == (ranks < 3).mean()
    changed = np.abs(seen["embedding"] - seen["clean_embedding"]).max(1) > 0
    assert changed[seen["clean"]].any() and not changed[~seen["clean"]].any()
    assert card["chance"] == to_text["chance_at_1"] == np.mean([len(true) for true in pairs.true_texts]) / len(pairs.class_names)


def test_processes_and_batches_change_nothing(model, sound, tmp_path):
    """As for classification: the runner knows nothing of the task."""
    cell = cell_for(model, sound)
    whole = evaluate(cell, tmp_path / "one", batch_size=20)
    parts = [evaluate(cell, tmp_path / "two", batch_size=3, place=Place(rank, 2)) for rank in (0, 1)]
    assert parts[0] is None and parts[1]["per_attack"] == whole["per_attack"]
    assert parts[1]["metrics"]["recall"] == whole["metrics"]["recall"]


def test_what_decides_the_figure_is_in_the_cell(model, pairs):
    """Other k, or other texts true of the same images, are other cells."""
    usual = cell_for(model, pairs, "clean")
    moved = replace(pairs, true_texts=(*pairs.true_texts[:-1], (0, 1)))
    assert len({usual.id, cell_for(model, pairs, "clean", recall_at=(1,)).id, cell_for(model, moved, "clean").id}) == 3
    assert cell_for(model, pairs, "clean").id == usual.id


def test_what_does_not_fit_is_named(model, data, pairs):
    """Captions of data that has none, classes of captions, a k beyond the gallery, protocols of class texts, label spaces."""
    clean = plan("clean", eps=0, steps=1, targets=1, classes=5)
    with pytest.raises(DataError, match="retrieval was asked of toy/test, which has classes and no captions: give datamodules.Captions"):
        Cell(model, data, clean, task=Retrieval())
    with pytest.raises(DataError, match="pairs/test has captions and no classes: ask for retrieval"):
        Cell(model, pairs, clean)
    with pytest.raises(DataError, match="recall at 21 of 25 texts and 20 images is always 1: give recall_at of 20 at most"):
        Cell(model, pairs, clean, task=Retrieval((1, 21)))
    for wrong in ((), (0, 5)):
        with pytest.raises(ConfigError, match="give one k or more, each 1 or above"):
            Retrieval(wrong)
    with pytest.raises(ConfigError, match="protocol tecoa brings class texts or a scale for classification, and the task is retrieval"):
        cell_under(plan("tecoa", eps=0, steps=1, targets=1, classes=5), model, pairs, Retrieval((1,)))
    with pytest.raises(DataError, match="selects classes, but pairs/test has captions"):
        first(pairs, 5, ["an ant", "a bee"], "two")
    with pytest.raises(DataError, match=r"1 images of bare/test have no caption \(numbers \[1\]\)"):
        CaptionedSet.of("bare", "test", data.images, torch.arange(2), [["a"], []])


def test_the_true_text_stands_last():
    """And has left its own place."""
    assert one_right(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([[True, True, False]])).tolist() == [[-np.inf, -np.inf, 2.0, 5.0]]


def test_the_command_retrieves_from_a_table(tmp_path: Path, capsys):
    """Recall stands below the table; asked of classes, it is refused."""
    random = np.random.default_rng(0)
    with (tmp_path / "pairs.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("image", "caption"))
        for number in range(6):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
            rows.writerows((f"{number}.png", f"{text} {number // 2}") for text in ("a picture", "some dots"))
    words = ["--models", "{m: {name: tiny}}", "--task", "aft.evaluation.Retrieval", "--task.recall_at", "[1, 5]", "--steps", "2",
             "--protocols", "[clean, pgd]", "--eps", "[2/255]", "--out", str(tmp_path / "out")]  # fmt: skip
    made = command.main(["--data", "datamodules.Captions", "--data.test", str(tmp_path / "pairs.csv"), *words])
    assert [card["data"]["classes"] for _, card in made] == [6, 6] and {card["data"]["n"] for _, card in made} == {6}
    told = made[1][1]["metrics"]["recall"]
    assert (told["most_texts_of_an_image"], told["most_images_of_a_text"]) == (2, 2)
    said = " ".join(capsys.readouterr().out.split())
    assert "Recall, image to text, %" in said and "Recall, text to image, % (m, pairs all, pgd 2/255; n = 6): at 1 clean" in said
    with pytest.raises(AftError, match="has classes and no captions"):
        command.main(["--data", "datamodules.Sample", *words])
