"""``python -m aft.clip.verify``: right weights pass, wrong ones and wrong flags do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aft.clip import ModelSpec, load_model
from aft.clip.verify import agree, fixed_image, main
from tests.clip.test_layouts import transformers_clip


def test_the_image_is_fixed_and_the_same_at_every_size() -> None:
    """In [0, 1], made without random numbers; four times the pixels average to the smaller one."""
    small, large = fixed_image(32), fixed_image(64)
    assert torch.equal(small, fixed_image(32)) and 0 <= small.min() < small.max() <= 1
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(large, 2), small, rtol=0, atol=0.03)


def test_against_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder against itself agrees; against other weights it does not, and the difference is printed."""
    transformers_clip("quick_gelu", tmp_path / "a")
    other = transformers_clip("quick_gelu", tmp_path / "b")
    with torch.no_grad():
        other.visual_projection.weight.mul_(torch.rand_like(other.visual_projection.weight))
    other.save_pretrained(tmp_path / "b")
    assert main(["miniclip32", str(tmp_path / "a"), "--against", str(tmp_path / "a")]) == 0
    assert "within 0.001" in capsys.readouterr().out
    assert main(["miniclip32", str(tmp_path / "a"), "--against", str(tmp_path / "b")]) == 1
    assert "ABOVE 0.001" in capsys.readouterr().out


def test_a_wrong_activation_is_seen(tmp_path: Path) -> None:
    """The very fault that this command is for: the same tensors, the other GELU."""
    transformers_clip("gelu", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        config[part]["hidden_act"] = "quick_gelu"
    right = tmp_path / "logits.json"
    assert main(["miniclip32", str(tmp_path), "--record", str(right)]) == 0 == main(["miniclip32", str(tmp_path), "--check", str(right)])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["miniclip32", str(tmp_path), "--check", str(right)]) == 1


def test_recorded_logits_say_what_they_are_of(tiny_folder: Path, tmp_path: Path) -> None:
    """Hash, resolution, activation and normalisation are beside them."""
    main(["tiny", str(tiny_folder), "--record", str(tmp_path / "x.json")])
    stored, record = json.loads((tmp_path / "x.json").read_text()), load_model(ModelSpec("tiny")).record
    assert stored["model"]["sha256"] == record.sha256 and stored["model"]["resolution"] == 32 and len(stored["logits"]) == 4


@pytest.mark.parametrize(
    ("text", "words"), [("{", "no recorded logits"), ('{"schema": "x", "prompts": [], "logits": [1]}', "record it anew")]
)
def test_a_foreign_file_is_named(text: str, words: str, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback, exit status 1."""
    (tmp_path / "x.json").write_text(text)
    assert main(["tiny", str(tiny_folder), "--check", str(tmp_path / "x.json")]) == 1
    assert words in capsys.readouterr().err
    assert main(["tiny", str(tiny_folder), "--against", str(tmp_path)]) == 1
    assert "reads no CLIPModel" in capsys.readouterr().err


def test_logits_that_are_not_finite_never_agree() -> None:
    """NaN compares as false with everything."""
    nan = torch.full((4,), float("nan"))
    assert not agree(nan, nan) and agree(torch.zeros(4), torch.full((4,), 9e-4)) and not agree(torch.zeros(4), torch.full((4,), 2e-3))
