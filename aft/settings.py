"""Help for command lines: near matches for unknown keys, settings that a class change would drop, differences of two runs."""

from __future__ import annotations

import importlib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from aft.errors import AftError, ConfigError, unknown_name


def underlying(error: BaseException) -> BaseException:
    """The error of ours that an argument parser wrapped, or the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, AftError):
        cause = cause.__cause__
    return cause or error


NOT_KNOWN = {
    "option": r"[Uu]nrecognized arguments?: --([\w.+]+)",
    "setting": r"(?:Option '([\w.]+)' is not accepted|Key '([\w.]+)' is not expected|does not accept option '([\w.]+)')",
    "class": r"(?:has no attribute '(\w+)'|Expected a dot import path string: (\w+)|Import path ([\w.]+) )",
}


def explain(message: str, parser: Any, bases: Iterable[type] = ()) -> str:
    """jsonargparse's message in one short line, with near matches where it names something that is not known.

    Args:
        message: what the parser says.
        parser: where the options stand.
        bases: classes whose subclasses and settings may be meant.
    """
    text = " ".join(message.split())
    ours = re.search(r"unknown (?:option|setting|class) '[^']*': (?:did you mean [^?]*\?|see --help for what is allowed\.)", text)
    if ours:  # a nested parser has explained it already
        return ours.group()
    if absent := absent_file(text):
        return absent
    refused = re.search(r"Errors: - (?!Expected |Parser key |Does not |Problem )(.+?) - Expected a <class 'NoneType'>", text)
    if refused:  # a class of ours refused the value, the parser then tried null
        return refused[1]
    choice = re.search(r"Expected a typing\.Literal\[([^\]]*)\]\. Got value: (\S+)", text)
    if choice:
        key = re.findall(r'Parser key "([\w.]+)"', text[: choice.start()])[-1:] or ["this setting"]
        return unknown_name(f"value of {key[0]}", choice[2], re.findall(r"'([^']*)'", choice[1]))
    for kind, pattern in NOT_KNOWN.items():
        found = re.search(pattern, text)
        if found:
            given = next(group for group in found.groups() if group)
            known = set(_options(parser)) if kind == "option" else _vocabulary(bases)[kind]
            if given in known:
                return f"setting {given!r} comes before the class that it belongs to: give the file or option with class_path first."
            near = unknown_name(kind, given, known).partition(" Known:")[0]
            return near if near.endswith("?") else f"{near} see --help for what is allowed."
    return text


def absent_file(text: str) -> str:
    """Of a parser's message about a file that is not there: one sentence with files of nearly that name; else nothing.

    Looked at are the folder that was named, and all of ``configs``.
    """
    found = re.search(r"File does not exist: '?([^']+)'?", text)
    if found is None:
        return ""
    path = Path(found[1])
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    there = {place for place in (*path.parent.glob(f"*{path.suffix}"), *Path("configs").rglob("*.yaml")) if place.is_file()}
    names = get_close_matches(path.name, {place.name for place in there}, n=2, cutoff=0.75)
    near = get_close_matches(str(path), [str(place) for place in there if place.name in names], n=2, cutoff=0)
    return f"there is no file {path}" + (f": did you mean {' or '.join(near)}?" if near else ".")


def _vocabulary(bases: Iterable[type]) -> dict[str, set[str]]:
    """Names of all subclasses, and of all their settings."""
    classes = {sub for base in bases for sub in _subclasses(base)}
    settings = {name for each in classes for ancestor in each.__mro__ for name in inspect.signature(ancestor).parameters}
    return {"class": {each.__name__ for each in classes}, "setting": settings - {"self", "args", "kwargs"}}


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for child in base.__subclasses__():
        yield from _subclasses(child)


def _options(parser: Any) -> Iterator[str]:
    """The names of a parser's options, those of its subcommands included."""
    for action in parser._actions:
        yield str(action.dest)
        if isinstance(action.choices, Mapping):
            for subparser in action.choices.values():
                yield from _options(subparser)


def dropped_settings(given: Any, effective: Any, path: str = "") -> list[str]:
    """Keys of ``init_args`` in a YAML file that are gone, because a later source named another class.

    Args:
        given: the contents of the YAML file.
        effective: what all sources came to.
        path: where in the settings we are.

    Returns:
        Dotted names of the lost keys.

    Example:
        >>> dropped_settings({"model": {"class_path": "A", "init_args": {"x": 1}}}, {"model": {"class_path": "B", "init_args": {"y": 2}}})
        ['model.init_args.x']
    """
    if not isinstance(given, Mapping) or effective is None or not hasattr(effective, "get"):
        return []
    lost: list[str] = []
    renamed = "class_path" in given and "init_args" in given and _short(given["class_path"]) != _short(effective.get("class_path"))
    if renamed:
        kept = effective.get("init_args") or {}
        lost += [f"{path}init_args.{key}" for key in given["init_args"] or {} if key not in kept]
    for key, value in given.items():
        lost += dropped_settings(value, effective.get(key), f"{path}{key}.")
    return lost


def _short(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2]


def new_differences(before: str, after: str) -> list[str]:
    """What two YAML texts say differently, one line a key."""
    old, new = dict(flat(yaml.safe_load(before))), dict(flat(yaml.safe_load(after)))
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings, each with its dotted name."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def defaults_of(class_path: str) -> dict[str, Any]:
    """The settings of a class with their defaults, by its dotted path."""
    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser()
    parser.add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
    return dict(parser.get_defaults().as_dict())


def in_short(effective: str, defaults: str) -> str:
    """The settings that differ from the defaults, also inside ``data``, as compact YAML."""
    usual, given = yaml.safe_load(defaults), yaml.safe_load(effective)
    short = {key: value for key, value in given.items() if value != usual.get(key)}
    of_class = defaults_of(short["data"]["class_path"])
    told = short["data"].get("init_args", {}).items()
    inside = {key: value for key, value in told if key not in of_class or _plain(of_class[key]) != value}
    short["data"] = short["data"]["class_path"] if not inside else {"class_path": short["data"]["class_path"], "init_args": inside}
    return str(yaml.safe_dump(short, sort_keys=False, default_flow_style=None, width=120))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def parser_of(prog: str, about: type) -> ArgumentParser:
    """The command line of a command whose settings are a class's arguments; the YAML of ``-c`` has the same keys."""
    parser = ArgumentParser(prog=prog, description=(about.__doc__ or "").split("\n")[0], exit_on_error=False)
    parser.add_argument("-c", "--config", action="config", help="YAML with any of these settings; give several, and the later wins.")
    parser.add_class_arguments(about, fail_untyped=True)
    return parser


def refusal(error: ArgumentError, parser: ArgumentParser) -> ConfigError:
    """What such a parser says, on one line, with near matches where a setting is not known."""
    text = " ".join(str(error).split())
    if absent := absent_file(text):
        return ConfigError(absent)
    if "arguments are required" in text:
        return ConfigError(f"{text}: give them, or with -c a YAML that has them (configs/ has some for each command).")
    unknown = re.search(r"Option '(\w+)[\w.]*' is not accepted|unrecognized arguments: --(\w+)", text)
    if unknown is None:
        return ConfigError(text)
    of_class = re.search(r"class_path '([\w.]+)': Option", text)
    known = defaults_of(of_class[1]) if of_class else {action.dest.split(".")[0]: None for action in parser._actions}
    return ConfigError(f"{text} ({unknown_name('setting', unknown[1] or unknown[2], known.keys() - {'help', 'print_config'})})")
