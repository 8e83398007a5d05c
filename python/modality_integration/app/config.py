"""Options from a YAML file and from MIR_* environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from modality_integration.app.endings import one_line_endings
from modality_integration.app.errors import InputError
from modality_integration.app.flat_options import Known, variables

# The options of each command, by name.
KNOWN: dict[str, Mapping[str, Known]] = {}
# MIR_* variables that are not options: those of the build, the kernels and the tests.
OF_OTHERS = (
    "MIR_CPU_ISA",
    "MIR_CUDA",
    "MIR_CUDA_ARCHS",
    "MIR_EARLIER",
    "MIR_EMULATED_FLAGS",
    "MIR_FLOAT64",
    "MIR_NATIVE",
    "MIR_REPORT",
    "MIR_SHARD",
)


def remember(command: str, known: Mapping[str, Known]) -> None:
    """Register the options of a command."""
    KNOWN[command] = known


def use_file(ctx: typer.Context, value: Path | None) -> Path | None:
    """Callback of --config: values in the file replace the defaults of the command's other options."""
    if value is not None and not ctx.resilient_parsing:
        with one_line_endings():
            ctx.default_map = read(value, KNOWN[str(ctx.command.name)])
    return value


def read(path: Path, known: Mapping[str, Known]) -> dict[str, Any]:
    """The options in a YAML file, by name, with checked types.

    A key is an option as typed, with or without its leading hyphens, or with underscores. A flag is true or false.
    "~/" expands to the home folder. Raises InputError naming the file and key for an unknown option, one given twice,
    or a value of the wrong type.
    """
    options: dict[str, Any] = {}
    for key, value in _entries(path):
        where = f"{path}: {key}"
        name = str(key).lstrip("-").replace("-", "_")
        option = known.get(name)
        opposite = name.removeprefix("no_")
        if option is None and opposite != name and opposite in known and known[opposite].negatable:
            name, option = opposite, known[opposite]
            value = not value if isinstance(value, bool) else value
        if option is None or name == "config":
            raise InputError(f"{where}: no such option{_nearest(name, known)}")
        if name in options:
            raise InputError(f"{where}: is given twice")
        options[name] = None if value is None and option.default is None else _value(value, option, where)
    return {name: value for name, value in options.items() if value is not None}


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each MIR_* variable that is set but belongs to no option."""
    known = {*OF_OTHERS, *(v for command, names in KNOWN.items() for name in names for v in variables(command, name))}
    unknown = sorted(name for name in environment if name.startswith("MIR_") and name not in known)
    return [f"environment variable {name} is unknown and ignored{_did_you_mean(name, known)}" for name in unknown]


def _entries(path: Path) -> Iterator[tuple[Any, Any]]:
    """Key and value of each entry of the file, in order, including duplicate keys."""
    import yaml

    if not path.is_file():
        raise InputError(f"config: {path} is a folder" if path.is_dir() else f"config: {path} does not exist")
    loader: Any = None
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"config: {path}: expected one `option: value` per line")
        for key, value in root.value:
            yield loader.construct_object(key, deep=True), loader.construct_object(value, deep=True)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _value(value: Any, option: Known, where: str) -> Any:
    if option.many:
        return [_one(item, option, where) for item in (value if isinstance(value, list) else [value])]
    return _one(value, option, where)


def _one(value: Any, option: Known, where: str) -> Any:
    kind = option.kind
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        wanted = f"one of {', '.join(choices)}" if value not in choices else None
    elif kind is bool:
        wanted = None if isinstance(value, bool) else "true or false"
    elif kind is int:
        wanted = None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
        if wanted is None and option.least is not None and value < option.least:
            wanted = f"a whole number >= {option.least}"
    else:
        wanted = None if isinstance(value, str) and value else "text (quote it if YAML reads it as another type)"
    if wanted is not None:
        raise InputError(f"{where}: expected {wanted}, got {value!r}")
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _nearest(name: str, known: Mapping[str, Known]) -> str:
    if name in KNOWN:
        return "; a config file has no sections: it lists the options of one command"
    typed = _did_you_mean(_key(name), map(_key, known))
    others = [command for command, options in KNOWN.items() if name in options]
    return typed or (f" (it is an option of mir {' and mir '.join(others)})" if others else "")


def _key(name: str) -> str:
    return name.replace("_", "-")


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, sorted(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
