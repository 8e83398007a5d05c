"""A breakdown of MIR's time into stages, each with a lower bound of its time on this machine.

While entered, `Watch` follows Python function calls and charges time to the innermost function that belongs to a stage
of STAGES; time within a section of SECTIONS is charged under that section's name. The lower bound is the bytes of the
stage at the rate of a copy, or its operations at the rate of a large matrix product.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import counts
import harness

METRIC = "modality_integration.metric"
MOMENTS = "mir_kernels.ops.moments.streaming:StreamingMoments"
CENTRING = "mir_kernels.ops.frechet.centring"
REST = "rest"
SHOWN = 0.05  # share of a run's time from which a table lists a stage
COLUMNS = (
    "case", "run", "stage", "calls", "seconds", "share", "least_seconds", "least_is", "copy_gbs", "matmul_gflops",
    "float64_gflops", *harness.ENVIRONMENT,
)  # fmt: skip


class Tokens(NamedTuple):
    """The tokens of a run: n tokens per layer, of which `text` are text tokens, their size d, and the layers."""

    n: int
    text: int
    d: int
    layers: int


class Stage(NamedTuple):
    """The functions of a stage, as module:qualified.name, and its lower bound, in words and as a count of bytes or
    operations: per run (`calls` is 1), or per call of one of its first `entries` functions."""

    functions: tuple[str, ...]
    least: Callable[[Tokens], counts.Count]
    words: str
    unit: str = "any"  # unit for the operations: "any" of the machine, or "float64"
    each_call: bool = False
    entries: int = 1


def _bytes(of: Callable[[Tokens], int]) -> Callable[[Tokens], counts.Count]:
    return lambda t: counts.Count(of(t), 0)


def _triangles(count: int) -> Callable[[Tokens], counts.Count]:
    return _bytes(lambda t: count * 4 * t.d * (t.d + 1))


STAGES = {
    "token norms": Stage(
        ("mir_kernels.ops.moments.functional:token_norms",),
        lambda t: counts.token_norms(t.n, t.d).times(t.layers)._replace(flops=0),
        "tokens read",
    ),
    "checks, attention sinks": Stage(
        (f"{METRIC}.forward_tokens:ForwardTokens.of",), lambda t: counts.Count(0, 0), "nothing to move"
    ),
    "gather of rows": Stage(
        (f"{METRIC}.streaming:ModalityIntegrationRate.update",),
        _bytes(lambda t: 4 * t.n * t.d * t.layers),
        "tokens read and written",
    ),
    "rows held back": Stage(
        (f"{METRIC}.outliers:OnePass.push", f"{METRIC}.outliers:OnePass.decide"),
        _bytes(lambda t: 4 * t.n * t.d * t.layers),
        "tokens read and written",
    ),
    "text norms for alpha": Stage(
        (f"{METRIC}.tokens:sum_of_norms",), _bytes(lambda t: 2 * t.text * t.d * t.layers), "text tokens read"
    ),
    "covariance update": Stage(
        # for streams, and for features in memory without and with bounds
        (f"{MOMENTS}.update", f"{MOMENTS}._fold_pending", f"{CENTRING}:moments", f"{CENTRING}:covariance"),
        lambda t: counts.Count(0, t.n * t.d * (t.d + 1) * t.layers),
        "one triangle of the products",
    ),
    "moments copied": Stage((f"{MOMENTS}.load_state_dict",), _triangles(2), "a triangle read and written", "any", True),
    "moments merged": Stage((f"{MOMENTS}.merge",), _triangles(3), "two triangles read, one written", "any", True),
    "covariance unpacked": Stage(
        (f"{MOMENTS}.covariance",),
        _bytes(lambda t: 4 * t.d * (t.d + 1) + 8 * t.d * t.d),
        "a triangle read, a matrix written",
        "any",
        True,
    ),
    "rank check": Stage(
        (f"{METRIC}.distance:TokenMoments.semidefinite",),
        lambda t: counts.Count(0, t.d**3 // 3),
        "a Cholesky factor",
        "float64",
        True,
    ),
    "roots": Stage(
        (
            "mir_kernels.ops.frechet.functional:trace_sqrt_report",
            "mir_kernels.ops.frechet.functional:trace_sqrt_product",
        ),
        lambda t: counts.Count(0, counts.trace_sqrt_cpu(t.d).flops),
        "a Cholesky factor, the standard form, its reduction to a band",
        "float64",
        True,
        entries=2,
    ),
    "roots of features": Stage(
        ("mir_kernels.ops.frechet.from_features:trace_sqrt_from_features",),
        lambda t: counts.Count(0, 0),
        "of few tokens",
        "float64",
        True,
    ),
    "proofs": Stage(
        (
            "mir_kernels.ops.frechet.log_determinants:root_bounds",
            "mir_kernels.ops.frechet.certificate:trace_bounds",
        ),
        lambda t: counts.Count(0, 5 * t.d**3),
        "15 Cholesky factors",
        "float64",
        True,
        entries=2,
    ),
}
SECTIONS = {"standard error": (f"{METRIC}.layer:_left_out", f"{METRIC}.accumulator:LayerAccumulator.leave_group_out")}


def code_of(path: str) -> CodeType:
    """The code object of module:qualified.name. AttributeError if there is none: STAGES then needs an update."""
    module, _, name = path.partition(":")
    owner: Any = importlib.import_module(module)
    found = reduce(inspect.getattr_static, name.split("."), owner)
    found = getattr(found, "__func__", getattr(found, "fget", found))
    return inspect.unwrap(found).__code__


class Watch:
    """Seconds and calls by stage, "section: stage" within a section. Entering it again continues the counts."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        # By identity, because the hash of a code object is not cached.
        self._stages = {id(code_of(path)): name for name, stage in STAGES.items() for path in stage.functions}
        self._first = {id(code_of(path)) for stage in STAGES.values() for path in stage.functions[: stage.entries]}
        self._sections = {id(code_of(path)): name for name, paths in SECTIONS.items() for path in paths}
        self._stack: list[tuple[str, str]] = []  # section and stage

    def __enter__(self) -> Watch:
        self._stack = [("", REST)]
        self._since = time.perf_counter()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self._charge()

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "return"):
            return
        code = id(frame.f_code)
        stage, section = self._stages.get(code), self._sections.get(code)
        if stage is None and section is None:
            return
        self._charge()
        if event == "return":
            self._stack.pop()
            return
        above, within = self._stack[-1]
        self._stack.append((section or above, REST if stage is None else stage))
        # A call from within the same stage does not count: an update called by a merge does, one by an update does not.
        if code in self._first and stage != within:
            self.calls[self._label()] += 1

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._label()] += now - self._since
        self._since = now

    def _label(self) -> str:
        section, stage = self._stack[-1]
        return f"{section}: {stage}" if section else stage


def rows(case: str, run: str, watch: Watch, tokens: Tokens, ceilings: dict[str, float]) -> list[dict]:
    """One row per stage, the longest first. ceilings: `harness.ceilings` of this run."""
    total = sum(watch.seconds.values())
    found = []
    for label, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1]):
        stage = STAGES.get(label.rpartition(": ")[2])
        row = {"case": case, "run": run, "stage": label, "calls": watch.calls[label], "seconds": seconds}
        row |= {"share": seconds / total, "least_seconds": None, "least_is": ""}
        # A pass over the tokens happens once: within a section it has no separate lower bound.
        if stage is not None and (stage.each_call or label in STAGES):
            least = stage.least(tokens)
            rate = ceilings["float64_gflops" if stage.unit == "float64" else "matmul_gflops"]
            each = max(least.bytes / ceilings["copy_gbs"], least.flops / rate) / 1e9
            row |= {"least_seconds": each * (watch.calls[label] if stage.each_call else 1), "least_is": stage.words}
        found.append(row | ceilings)
    return found


def write(found: Sequence[dict], path: Path, device: str) -> None:
    """The rows as a CSV, with the environment."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in found:
            row = row | harness.environment_columns(device)
            writer.writerow({k: f"{row[k]:.4g}" if isinstance(row[k], float) else row[k] for k in COLUMNS})


def lines(found: Sequence[dict]) -> list[str]:
    """A Markdown table of the stages from SHOWN on; `found` are rows of `rows` or of the CSV."""
    head = (found[0]["case"], "stage", "calls", "seconds", "share", "least, s", "x least", "the least is")
    made = [f"| {' | '.join(head)} |", "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    before = None
    for run in dict.fromkeys(row["run"] for row in found):
        mine = [row for row in found if row["run"] == run]
        small = [row for row in mine if float(row["share"]) < SHOWN]
        for row in mine:
            if row in small:
                continue
            seconds, least = float(row["seconds"]), float(row["least_seconds"] or 0.0)
            cells = ["" if run == before else run, row["stage"], str(int(row["calls"]) or ""), f"{seconds:.3g}"]
            cells += [f"{float(row['share']):.0%}", f"{least:.2g}" if least else ""]
            cells += [f"{seconds / least:.1f}" if least else "", row["least_is"] if least else ""]
            made.append(f"| {' | '.join(cells)} |")
            before = run
        if small:
            seconds, share = (sum(float(row[name]) for row in small) for name in ("seconds", "share"))
            made.append(f"|  | {len(small)} more, below {SHOWN:.0%} each |  | {seconds:.2g} | {share:.0%} |  |  |  |")
    return made
