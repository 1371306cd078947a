"""Every YAML under configs/data is a datamodule that jsonargparse can build, with a comment above each key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from datamodules.base import LabelledImages

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("name", ["sample", "tiny_imagenet32", "cifar10", "folder"])
def test_config_builds_its_datamodule(name: str) -> None:
    """Typed and complete: unknown keys are errors."""
    path = next(path for path in CONFIGS if path.stem == name)
    parser = ArgumentParser()
    parser.add_subclass_arguments(LabelledImages, "data")
    given = yaml.safe_load(path.read_text())
    data = parser.instantiate_classes(parser.parse_object(given)).data
    assert isinstance(data, LabelledImages) and data.batch_size == given["data"]["init_args"]["batch_size"]
    lines = path.read_text().splitlines()
    body = lines[lines.index("  init_args:") + 1:]
    assert all(body[place - 1].lstrip().startswith("#") for place, line in enumerate(body) if not line.lstrip().startswith("#"))
    with pytest.raises(SystemExit):
        parser.parse_object({"data": {**given["data"], "init_args": {**given["data"]["init_args"], "batchsize": 1}}})
