"""The table of methods says what its cards say, marks large gaps, and ranks nothing below twice the noise of training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from aft import cards
from aft.errors import DataError
from bench import methods_report, methods_table
from bench.page import placed

RECIPE = yaml.safe_load(methods_table.RECIPE.read_text())
ANY_CARD = next(Path("results/cards/tecoa_mini").rglob("*apgd*.json"))


def put(folder: Path, protocol: str, eps: float | None, accuracy: float, **changed: Any) -> None:
    """One card, made from a real one; ``changed`` are facts of its data."""
    card: dict[str, Any] = json.loads(ANY_CARD.read_text())
    card["data"] |= {"name": "cifar10", "n": RECIPE["evaluate"]["n"], **changed}
    card["protocol"]["name"] = protocol
    card["threat"] = None if eps is None else {**card["threat"], "eps": eps / 255}
    card["clean_accuracy" if eps is None else "robust_accuracy"] = accuracy
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{protocol}-{eps}.json"
    path.write_text(json.dumps(card))
    right = np.arange(card["data"]["n"]) < round(accuracy * card["data"]["n"])
    cards.write_arrays(path.with_suffix(".npz"), {"clean": right, "right": right[:, None]})


def put_run(results: Path, label: str, clean: float, apgd: float, pgd: float) -> None:
    """Three cards and the entry of one run."""
    for protocol, eps, accuracy in (("clean", None, clean), ("apgd", 2, apgd), ("pgd", 2, pgd)):
        put(results / "cards" / label, protocol, eps, accuracy)
    (results / "rows").mkdir(exist_ok=True)
    (results / "rows" / f"{label}.json").write_text(json.dumps({"rate": 3e-4}))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """TeCoA with three seeds (standard deviation one point), a method inside its noise, and one far above with a large gap."""
    for seed, robust in enumerate((0.19, 0.20, 0.21)):
        put_run(tmp_path, f"tecoa_seed{seed}", robust + 0.1, robust, robust)
    put_run(tmp_path, "near_seed0", 0.30, 0.215, 0.22)
    put_run(tmp_path, "far_seed0", 0.25, 0.23, 0.27)
    return tmp_path


def lines_of(results: Path) -> dict[str, str]:
    """Lines of the table by their first cell."""
    page = methods_report.page(RECIPE, results)
    return {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}


def test_seeds_are_averaged(results: Path) -> None:
    assert "| 30.0 ± 2.0 | 20.0 ± 1.8 | 0.0 |" in lines_of(results)["tecoa, mean of 3 seeds"]


def test_differences_inside_the_noise_are_not_ranked(results: Path) -> None:
    lines = lines_of(results)
    assert "↑" not in lines["near"] and "↓" not in lines["near"]
    assert "25.0 ± 1.9 ↓ | 23.0 ± 1.9 ↑" in lines["far"]


def test_a_difference_that_other_images_would_undo_is_not_ranked(results: Path) -> None:
    """Three points are nothing where a fifth of the images changed sides: twice the standard error is above them."""
    path = results / "cards" / "far_seed0" / "apgd-2.npz"
    told = cards.read_arrays(path)
    cards.write_arrays(path, {name: column[::-1].copy() for name, column in told.items()})
    assert "25.0 ± 1.9 ↓ | 23.0 ± 1.9 |" in lines_of(results)["far"]


def test_two_cards_of_one_figure_are_refused(results: Path) -> None:
    """None of them silently wins."""
    folder = results / "cards" / "far_seed0"
    for suffix in (".json", ".npz"):
        (folder / f"again{suffix}").write_bytes((folder / f"apgd-2{suffix}").read_bytes())
    with pytest.raises(DataError, match="another card of far_seed0 is of 2/255 on cifar10"):
        methods_report.page(RECIPE, results)


def test_rows_of_other_images_are_refused(results: Path) -> None:
    """Differences are taken image by image: another card of the run, or another run."""
    card = results / "cards" / "near_seed0" / "apgd-2.json"
    told = json.loads(card.read_text())
    card.write_text(json.dumps({**told, "data": {**told["data"], "index_sha256": "0" * 64}}))
    with pytest.raises(DataError, match="other images than another card of near_seed0 on cifar10"):
        methods_report.page(RECIPE, results)
    for path in card.parent.glob("*.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "data": {**told["data"], "index_sha256": "0" * 64}}))
    with pytest.raises(DataError, match="cards of cifar10 .* are of different images"):
        methods_report.page(RECIPE, results)


def test_what_class_texts_go_through_stands_beside_the_name(results: Path) -> None:
    """A row with tuned texts is compared with rows without: every table says so."""
    for path in (results / "cards" / "near_seed0").glob("*.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "model": {**told["model"], "text_transform": "residual"}}))
    assert "near (class texts: residual)" in lines_of(results) and "far" in lines_of(results)
    assert "| near (class texts: residual) |" in methods_report.in_short(RECIPE, results)


def test_a_collapsed_method_is_not_ranked(results: Path) -> None:
    """A model that names one class for all images is right as often as guessing is, and no attack takes that from it."""
    put_run(results, "one_class_seed0", 0.11, 0.11, 0.11)  # ten classes
    lines, said = lines_of(results), told(results)
    assert any(one.startswith("`one_class` has collapsed: its clean accuracy is within two standard errors of guessing") for one in said)
    assert not any(mark in lines["one_class"] for mark in "↑↓") and not any("`one_class` is above" in one for one in said)


def test_a_large_gap_is_marked(results: Path) -> None:
    lines = lines_of(results)
    assert "| 4.0 (!) |" in lines["far"] and "(!)" not in lines["near"]


def told(results: Path) -> list[str]:
    """The sentences of CIFAR-10's table."""
    (table,) = methods_report.tables(RECIPE, results)
    return methods_report.sentences(table)


def test_sentences_follow_from_the_figures(results: Path) -> None:
    """A rise, a fall, no difference, and a gap; a method that only falls does not help, and it is said."""
    put_run(results, "low_seed0", 0.27, 0.20, 0.20)
    put_run(results, "high_seed0", 0.30, 0.24, 0.24)
    assert told(results) == [
        "Standard deviation of TeCoA over 3 seeds, in points: 1.0 (clean), 1.0 (2/255).",
        "`far` is above TeCoA by 3.0 points (2/255); for clean it does not help here: below by 5.0 points (clean).",
        "`high` is above TeCoA by 4.0 points (2/255), and nowhere told apart below.",
        "`low` does not help here: below TeCoA by 3.0 points (clean), and nowhere told apart above.",
        "Not told apart from TeCoA: `near`.",
        "PGD is more than 3 points above APGD, so that PGD alone would flatter: `far` (4.0 at 2/255).",
    ]


def test_nothing_is_ranked_before_the_noise_is_known(results: Path) -> None:
    """One seed has no standard deviation, and two have hardly one: not a noise of zero."""
    for seed in (2, 1):
        (results / "rows" / f"tecoa_seed{seed}.json").unlink()
        assert told(results)[0].startswith(f"TeCoA has {seed} of 3 seeds") and len(told(results)) == 2
        assert not any("↑" in line or "↓" in line for line in lines_of(results).values())


def test_a_row_that_is_not_whole_is_not_in_the_table(results: Path) -> None:
    """Cards without what is kept of the run, or a run with a card missing: two folders are put together file by file."""
    (results / "rows" / "near_seed0.json").unlink()
    next((results / "cards" / "far_seed0").glob("pgd*")).unlink()
    assert [row.name for table in methods_report.tables(RECIPE, results) for row in table.rows] == ["tecoa"]


def test_cards_of_another_number_of_images_are_refused(results: Path) -> None:
    """Errors and the head of the page are for the recipe's n; a try-out of ten images in the folder is not a row."""
    put(results / "cards" / "near_seed0", "apgd", 2, 0.4, n=10)
    with pytest.raises(DataError, match=r"apgd-2\.json: n = 10 images, and the table is of 500"):
        methods_report.page(RECIPE, results)


def test_the_worst_verdict_of_a_row_stands_in_it(results: Path) -> None:
    """A suspect card of three makes a suspect row."""
    path = next((results / "cards" / "near_seed0").glob("pgd*"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": {"status": "suspect", "failed_checks": ["E1"]}}))
    lines = lines_of(results)
    assert lines["near"].endswith("| suspect |") and lines["far"].endswith("| reliable |")


def test_pre_training_is_not_ranked_among_fine_tunings(results: Path) -> None:
    """It starts from nothing: a table of its own, with what it cost."""
    put_run(results, "adversarial_pretraining_seed0", 0.2, 0.1, 0.1)
    (results / "rows" / "adversarial_pretraining_seed0.json").write_text(json.dumps({"rate": 1e-3, "operations": 1.25e15}))
    assert [row.name for table in methods_report.tables(RECIPE, results) for row in table.rows] == ["tecoa", "far", "near"]
    assert lines_of(results)["adversarial_pretraining"].endswith("| 20.0 ± 1.8 | 10.0 ± 1.3 | 1.25e+15 | reliable |")


def test_the_docs_and_the_page_are_what_the_committed_cards_make() -> None:
    """No figure rots: `python -m bench.methods_table --show` writes both."""
    docs = methods_table.DOCS.read_text()
    assert placed(docs, "bench.methods_table", methods_report.in_short(RECIPE, methods_table.RESULTS)) == docs
    if methods_report.runs_of(methods_table.RESULTS):
        assert methods_report.page(RECIPE, methods_table.RESULTS) == (methods_table.RESULTS / "README.md").read_text()


def test_the_block_of_the_docs_is_short_and_says_all(results: Path) -> None:
    """Both data sets in one table, every sentence, how many methods are there."""
    block = methods_report.in_short(RECIPE, results)
    assert "| near | 30.0 ± 2.0 | 21.5 ± 1.8 | reliable |" in block and "1 of 13 methods are measured" in block
    assert all(f"- {sentence}" in block for sentence in told(results))


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A typing error is not a run of nothing; costs are relative to TeCoA's."""
    for words, expected in ((["--only", "tecoaa"], "did you mean 'tecoa'"), (["--only", "fare", "--cost"], "add tecoa")):
        monkeypatch.setattr("sys.argv", ["methods_table", *words])
        with pytest.raises(SystemExit):
            methods_table.main()
        assert expected in capsys.readouterr().err


def test_no_table_without_tecoa(tmp_path: Path) -> None:
    put_run(tmp_path, "far_seed0", 0.25, 0.23, 0.27)
    assert "far" not in lines_of(tmp_path)


def test_uncommitted_weights_are_not_in_git(tmp_path: Path) -> None:
    assert methods_table.in_git(Path("results/weights/tecoa_seed0.safetensors"))
    assert not methods_table.in_git(Path("results/weights/no_such.safetensors"))


def test_a_row_that_stands_whole_is_not_done_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may lose its runs: what the results hold is enough; a row with a card missing is done."""
    recipe = {"evaluate": {"eps": ["2/255"]}, "train": {"steps": 1}}
    monkeypatch.setattr(methods_table, "RESULTS", results)
    assert not methods_table.stands("near_seed0", recipe)
    for data in ("one", "two", "three"):
        put(results / "cards" / "near_seed0", data, None, 0.5)
    assert methods_table.stands("near_seed0", recipe)
    assert not list(methods_table.trained(recipe, [methods_table.Method("near", "Near")]))


def test_costs_of_two_machines_are_not_put_into_one_table(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same hardware they stay beside each other, and the page shows both, median and range."""
    monkeypatch.setattr(methods_table, "RESULTS", results)
    methods_table.keep_costs({"far": [1.3, 1.5, 1.4]})
    methods_table.keep_costs({"near": [1.0, 1.0, 1.0]})
    assert "1.40 (1.30 to 1.50)" in lines_of(results)["far"] and "1.00 (1.00 to 1.00)" in lines_of(results)["near"]
    told = json.loads((results / "cost.json").read_text())
    (results / "cost.json").write_text(json.dumps({**told, "machine": {**told["machine"], "processor": "another"}}))
    methods_table.keep_costs({"near": [1.1]})
    assert json.loads((results / "cost.json").read_text())["ratios"] == {"near": [1.1]}


def test_a_rate_is_searched_once_for_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed that is missing takes the rate of the seed that stands, also on another machine, where the search's runs are not."""
    monkeypatch.setattr(methods_table, "RESULTS", tmp_path)
    monkeypatch.setattr(methods_table, "fit", lambda *given: pytest.fail("searched again"))
    told = {"rate": 3e-4, "search": {"0.0003": {"clean_accuracy": 0.3, "robust_accuracy": 0.1}}}
    methods_table.keep("tecoa_seed1", told)
    assert methods_table.search(RECIPE, methods_table.Method.of("tecoa", RECIPE["methods"]["tecoa"])) == (told["rate"], told["search"])


def test_commands_on_cards_name_no_place_of_a_machine() -> None:
    """Of all cards in git: paths in their commands begin in the project's folder."""
    commands = {json.loads(path.read_text())["command"] for path in Path("results").rglob("cards/**/*.json")}
    assert commands and not [command for command in commands if any(word.startswith(("/", "~")) for word in command.split())]


def test_the_table_s_commands_are_the_same_on_every_machine() -> None:
    """What lies in the project is named from its folder."""
    assert methods_table.of_this_project(methods_table.RUNS / "eval") == "runs/methods_table/eval"
    assert methods_table.of_this_project(Path("/elsewhere/eval")) == "/elsewhere/eval"
