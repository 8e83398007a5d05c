"""Commands whose options are the fields of dataclasses, as typer, the YAML file and the environment see them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

METAVARS: Mapping[Any, str] = {int: "N", float: "X", Path: "PATH", str: "NAME"}


class Known(NamedTuple):
    """One option or argument of a command.

    kind: its type, without None and list. many: whether it accepts several values. negatable: whether --no-... exists.
    """

    kind: Any
    many: bool
    negatable: bool
    default: Any
    least: float | None


class FlatOptions:
    """The parameters of a command: those of its function, with each dataclass replaced by its fields.

    Fields without a `typer.Option` are not on the command line and keep their defaults. The help shows each option's
    metavar and choices. Each option can be set by the variables MIR_<COMMAND>_<OPTION> and MIR_<OPTION>.
    """

    def __init__(self, function: Callable) -> None:
        hints = get_type_hints(function, include_extras=True)
        self._groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
        self._fields: dict[str, list[str]] = {}
        self.parameters: list[inspect.Parameter] = []
        self.known: dict[str, Known] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in self._groups:
                self._add(function.__name__, name, parameter.default, hints[name])
                continue
            of_fields = get_type_hints(self._groups[name], include_extras=True)
            fields = [f for f in dataclasses.fields(self._groups[name]) if hasattr(of_fields[f.name], "__metadata__")]
            self._fields[name] = [field.name for field in fields]
            for field in fields:
                default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
                self._add(function.__name__, field.name, default, of_fields[field.name])
        # Required parameters come first.
        self.parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)

    def grouped(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the function, from option values by name."""
        inside = {field for fields in self._fields.values() for field in fields}
        groups = {
            name: group(**{field: values[field] for field in self._fields[name]})
            for name, group in self._groups.items()
        }
        return {name: value for name, value in values.items() if name not in inside} | groups

    def _add(self, command: str, name: str, default: Any, annotation: Any) -> None:
        kind, option = annotation.__origin__, copy.copy(annotation.__metadata__[0])
        self.known[name] = known = _known(kind, default, option)
        if type(option).__name__ == "OptionInfo":
            option.envvar, option.show_envvar = variables(command, name), False
            if option.metavar is None and known.kind is not bool:
                option.metavar = METAVARS.get(known.kind, "NAME")
            if get_origin(known.kind) is Literal:
                option.help = f"{option.help} [{'|'.join(get_args(known.kind))}]"
        annotated: Any = Annotated[kind, option]
        self.parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotated)
        )


def variables(command: str, option: str) -> list[str]:
    """The environment variables of an option, the one that takes precedence first."""
    return [f"MIR_{command}_{option}".upper(), f"MIR_{option}".upper()]


def source(ctx: Any, name: str) -> str | None:
    """Where an option was set: "COMMANDLINE", "ENVIRONMENT" or "DEFAULT_MAP" (the file); None for a default."""
    found = ctx.get_parameter_source(name)
    return None if found is None or found.name == "DEFAULT" else found.name


def variable_of(ctx: Any, name: str) -> str:
    """The environment variable that set an option."""
    return next(variable for variable in variables(str(ctx.command.name), name) if os.environ.get(variable))


def spelled(name: str) -> str:
    """The option as typed on the command line."""
    return "--" + name.replace("_", "-")


def _known(annotation: Any, default: Any, option: Any) -> Known:
    kind, many = annotation, False
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is list:
        (kind,), many = get_args(kind), True
    # Within `Annotated`, typer stores an option's first name as its default.
    named = [name for name in (option.default, *(option.param_decls or ())) if isinstance(name, str)]
    negatable = kind is bool and not named
    return Known(kind, many, negatable, default, option.min)
