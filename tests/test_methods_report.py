"""The table of methods says what its cards say, marks large gaps, and ranks nothing below twice the noise of training."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench import methods_report, methods_table

ANY_CARD = next(Path("results/cards/tecoa_mini").rglob("*apgd*.json"))


def put(folder: Path, protocol: str, eps: float | None, accuracy: float) -> None:
    """One card, made from a real one."""
    card: dict[str, Any] = json.loads(ANY_CARD.read_text())
    card["data"]["name"], card["protocol"]["name"] = "cifar10", protocol
    card["threat"] = None if eps is None else {**card["threat"], "eps": eps / 255}
    card["clean_accuracy" if eps is None else "robust_accuracy"] = accuracy
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{protocol}-{eps}.json").write_text(json.dumps(card))


def put_run(results: Path, label: str, clean: float, apgd: float, pgd: float) -> None:
    """Three cards and the entry of one run."""
    for protocol, eps, accuracy in (("clean", None, clean), ("apgd", 2, apgd), ("pgd", 2, pgd)):
        put(results / "cards" / label, protocol, eps, accuracy)
    runs = json.loads((results / "runs.json").read_text()) if (results / "runs.json").exists() else {}
    (results / "runs.json").write_text(json.dumps({**runs, label: {"rate": 3e-4}}))


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
    recipe = yaml.safe_load(methods_table.RECIPE.read_text())
    page = methods_report.page(recipe, results)
    return {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}


def test_seeds_are_averaged(results: Path) -> None:
    assert "| 30.0 ± 2.0 | 20.0 ± 1.8 | 0.0 |" in lines_of(results)["tecoa, mean of 3 seeds"]


def test_differences_inside_the_noise_are_not_ranked(results: Path) -> None:
    lines = lines_of(results)
    assert "↑" not in lines["near"] and "↓" not in lines["near"]
    assert "25.0 ± 1.9 ↓ | 23.0 ± 1.9 ↑" in lines["far"]


def test_a_large_gap_is_marked(results: Path) -> None:
    lines = lines_of(results)
    assert "| 4.0 (!) |" in lines["far"] and "(!)" not in lines["near"]


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
