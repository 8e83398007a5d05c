"""Refuse options that were given but would have no effect, so that results are not misread."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import typer

from modality_integration.app.errors import InputError
from modality_integration.app.flat_options import source, spelled, variable_of

Values = Mapping[str, Any]


class NoEffect(NamedTuple):
    """option: the option without effect. beside: the option whose value, or absence, cancels its effect.

    when: computes from the values of all options whether this applies. why: what happens instead.
    """

    option: str
    beside: str
    when: Callable[[Values], bool]
    why: str


def _published(of: Values) -> bool:
    return of["protocol"] == "published"


def _study(*names: str) -> Callable[[Values], bool]:
    return lambda of: of["study"] is not None and (not names or of["study"] in names)


def _study_and(option: str) -> Callable[[Values], bool]:
    return lambda of: of["study"] is not None and bool(of[option])


OF_COMPUTE = (
    NoEffect("seed", "protocol", _published, "files are used in order"),
    NoEffect("text_tokens", "protocol", _published, "the whole prose is used"),
    NoEffect("template", "protocol", _published, "it has its own conversation template"),
    NoEffect("repeat", "protocol", _published, "files are used in order, so there is only one set of samples"),
    NoEffect(
        "repeat",
        "study",
        lambda of: of["study"] != "samples" and not _published(of),
        "only --study samples draws sets of samples",
    ),
    NoEffect("template", "study", _study("template"), "it measures both chat and plain"),
    NoEffect("normalize", "study", _study("normalization"), "it measures both with and without"),
    NoEffect(
        "groups", "study", lambda of: _study("normalization")(of) and of["groups"], "it computes no standard errors"
    ),
    NoEffect("bounds", "study", _study_and("bounds"), "a study computes no bounds"),
    NoEffect("second_pass", "study", _study_and("second_pass"), "a study makes one pass over the data"),
    NoEffect("restart", "study", _study_and("restart"), "a study writes no checkpoint"),
    NoEffect("checkpoint_every", "study", _study(), "a study writes no checkpoint"),
    NoEffect(
        "second_pass",
        "outliers",
        lambda of: of["study"] is None and of["outliers"] == "none" and of["second_pass"],
        "no token is removed, so none can be missed",
    ),
    NoEffect(
        "device",
        "device_map",
        lambda of: of["device_map"] is not None and of["device"] != "auto",
        "the device map places the weights, and the computation follows them",
    ),
    NoEffect(
        "revision",
        "model",
        lambda of: Path(of["model"]).exists() and (of["processor"] is None or Path(of["processor"]).exists()),
        "it is a folder, and only hub names have revisions",
    ),
)
OF_STATES = (
    NoEffect(
        "groups",
        "outliers",
        lambda of: of["outliers"] == "median" and of["groups"],
        "group medians do not determine the overall median, so there is no standard error",
    ),
)
TABLE: Mapping[str, tuple[NoEffect, ...]] = {"compute": OF_COMPUTE, "states": OF_STATES}


def refuse_without_effect(ctx: typer.Context, values: Values) -> None:
    """Raise a one-line InputError for options that were given (typed, in a file, by a variable) without effect."""
    found: dict[str, str] = {}
    for row in TABLE.get(str(ctx.command.name), ()):
        if row.option not in found and source(ctx, row.option) is not None and row.when(values):
            given, value = as_given(ctx, row.option, values[row.option]), values[row.beside]
            beside = f"without {spelled(row.beside)}" if value is None else f"with {as_given(ctx, row.beside, value)}"
            found[row.option] = f"{given} has no effect {beside}: {row.why}"
    if found:
        raise InputError("; ".join(found.values()))


def as_given(ctx: typer.Context, name: str, value: Any) -> str:
    """An option and its value as they were given: typed, in a file or by a variable."""
    where = source(ctx, name)
    if where == "ENVIRONMENT":
        variable = variable_of(ctx, name)
        return f"{variable}={os.environ[variable]}"
    if where == "DEFAULT_MAP":
        return f"{name.replace('_', '-')}: {value} in {ctx.params['config']}"
    if isinstance(value, bool):
        return spelled(name if value else f"no_{name}")
    return f"{spelled(name)} {shlex.quote(str(value))}"
