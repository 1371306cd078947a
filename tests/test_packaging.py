"""What `pip install` gives and what is locked: one version, bounds that the lock keeps, a wheel that holds `aft` alone."""

import ast
import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import aft

ROOT = Path(__file__).resolve().parents[1]
LOCKED_EXTRAS = ("eval", "test", "dev", "hf", "onnx")
BUILD_FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> list[Requirement]:
    """The requirements of a setup.cfg value or of a lock file, comments left out."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def core(config: configparser.ConfigParser) -> list[Requirement]:
    return requirements(config["options"]["install_requires"])


def declared(config: configparser.ConfigParser) -> list[Requirement]:
    """Core and every extra that the lock covers."""
    extras = config["options.extras_require"]
    return core(config) + [requirement for extra in LOCKED_EXTRAS for requirement in requirements(extras[extra])]


@pytest.fixture(scope="module")
def lock() -> list[Requirement]:
    return requirements((ROOT / "requirements.lock").read_text(encoding="utf-8"))


def version_of(pin: Requirement) -> Version:
    (specifier,) = pin.specifier
    return Version(specifier.version)


def here(pins: list[Requirement]) -> dict[str, Version]:
    """Name to version, of the lines that apply to this Python and system."""
    return {canonicalize_name(pin.name): version_of(pin) for pin in pins if pin.marker is None or pin.marker.evaluate()}


def test_one_version_everywhere(config):
    """The package names its version once; the citation repeats it and the changelog leads to it."""
    assert config["metadata"]["version"] == "attr: aft.__version__"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE).group(1) == aft.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{aft.__version__}]" in changelog


def test_every_line_of_the_lock_is_exact(lock):
    loose = [str(pin) for pin in lock if len(pin.specifier) != 1 or next(iter(pin.specifier)).operator != "==" or "*" in str(pin.specifier)]
    assert len(lock) > 50
    assert not loose


def test_the_lock_has_one_version_of_each_package_here(lock):
    """Lines for several Pythons exclude each other."""
    names = [canonicalize_name(pin.name) for pin in lock if pin.marker is None or pin.marker.evaluate()]
    assert len(names) == len(set(names))


def test_the_lock_keeps_the_declared_bounds(config, lock):
    """On every Python and system: all lines of the lock for a declared package lie inside its bounds."""
    pins = {}
    for pin in lock:
        pins.setdefault(canonicalize_name(pin.name), []).append(version_of(pin))
    missing = [r.name for r in declared(config) if canonicalize_name(r.name) not in pins]
    assert not missing
    outside = [f"{r}: {v}" for r in declared(config) for v in pins[canonicalize_name(r.name)] if v not in r.specifier]
    assert not outside


def test_every_dependency_has_a_lower_bound(config):
    """Extras that are not locked too: a bare name would take whatever is installed."""
    extras = config["options.extras_require"]
    every = core(config) + [requirement for extra in extras for requirement in requirements(extras[extra])]
    assert not [r.name for r in every if not any(s.operator == ">=" for s in r.specifier)]


def test_every_dependency_has_its_reason():
    """In setup.cfg a comment line stands above each dependency."""
    lines = [line.strip() for line in (ROOT / "setup.cfg").read_text(encoding="utf-8").splitlines()]
    bounds = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z0-9_.\[\]-]+>=", line)]
    assert len(bounds) > 20
    assert not [lines[i] for i in bounds if not lines[i - 1].startswith("#")]


def test_the_lock_is_closed(lock):
    """What a locked package needs is locked too (read from the packages installed here in the locked version)."""
    pins, open_ends, seen = here(lock), [], 0
    for name, version in pins.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(installed.version) != version:
            continue
        seen += 1
        needs = [Requirement(line) for line in installed.requires or []]
        open_ends += [f"{name} needs {r}" for r in needs if applies(r) and pins.get(canonicalize_name(r.name)) not in r.specifier]
    assert seen > 50, f"only {seen} locked packages are installed here; run this with the environment of `make test`"
    assert not open_ends


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def test_torch_and_torchvision_are_a_pair(lock):
    """torchvision's minor version is torch's plus 15 since 2.0, and its patch level is the same."""
    pins = here(lock)
    torch, torchvision = pins["torch"], pins["torchvision"]
    assert (torch.major, torchvision.major) == (2, 0)
    assert (torchvision.minor, torchvision.micro) == (torch.minor + 15, torch.micro)


def test_compromised_lightning_is_out_of_bounds(config):
    """2.6.2 and 2.6.3 carried malware; 2.7 is not tried."""
    (lightning,) = (r for r in core(config) if r.name == "lightning")
    assert not list(lightning.specifier.filter(["2.6.1", "2.6.2", "2.6.3", "2.6.5", "2.7.0"]))
    assert "2.6.6" in lightning.specifier


def test_no_registry_and_no_local_path_in_the_lock():
    """The lock works with whatever index pip is set to use."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.search(r"://|^-| @ ", line)]


def third_party_imports(paths: list[Path]) -> dict[str, str]:
    """Top-level module to the first file that imports it; the standard library and the project itself left out."""
    own = {"aft", "callbacks", "datamodules", "train", "eval", "bench", "tests"} | set(sys.stdlib_module_names)
    found: dict[str, str] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                found.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    return {name: place for name, place in found.items() if name not in own}


def test_what_is_imported_is_declared(config):
    """Every package that the code imports is a declared dependency, core or extra, not one that happens to be there."""
    extras = config["options.extras_require"]
    every = core(config) + [requirement for extra in extras for requirement in requirements(extras[extra])]
    names = {canonicalize_name(r.name) for r in every}
    paths = [p for folder in ("aft", "callbacks", "datamodules") for p in (ROOT / folder).rglob("*.py")] + list(ROOT.glob("*.py"))
    providers = importlib.metadata.packages_distributions()
    provided = {module: {canonicalize_name(d) for d in providers.get(module, [module])} for module in third_party_imports(paths)}
    undeclared = {module: place for module, place in third_party_imports(paths).items() if not provided[module] & names}
    assert not undeclared


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """Names in a wheel that is built from a copy, so that nothing is left in the work tree."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, copy / name)
    for folder in ("aft", "callbacks", "datamodules", "configs", "tests"):  # all that a build could pick up by mistake
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.tar"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("aft-*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_aft_alone(wheel):
    """Neither datamodules nor callbacks nor scripts nor tests."""
    assert {name.split("/")[0] for name in wheel} == {"aft", f"aft-{aft.__version__}.dist-info"}


def test_the_wheel_holds_every_module_of_aft(wheel):
    """A folder without `__init__.py` would silently stay behind."""
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "aft").rglob("*.py")}
    assert modules
    assert not modules - set(wheel)


def test_the_wheel_holds_types_weights_and_licence(wheel):
    names = set(wheel)
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "aft").rglob("*") if p.suffix in {".json", ".safetensors", ".jinja"}}
    info = f"aft-{aft.__version__}.dist-info"
    assert not ({"aft/py.typed", f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} | data) - names


def test_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_notice_names_what_comes_from_others():
    text = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for part in ("CIFAR-10", "Tiny-ImageNet", "WordNet 3.0 Copyright 2006 by Princeton University"):
        assert part in text
