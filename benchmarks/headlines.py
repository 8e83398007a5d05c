"""The README's table of ratios: a few rows of the CSVs in benchmarks/data/, each against one rival of the same run.

`HEADLINES` names the rows; `lines` looks them up. Some show a rival that is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Headline(NamedTuple):
    """One row: the job in words; csv, operation and the start of case; our rival and the other one, by name."""

    job: str
    csv: str
    operation: str
    case: str
    ours: str
    rival: str


_MOCA, _MOMENTS, _SQRTM = "moca_cpu", "moments_cpu", "sqrtm_cpu"
_STATES, _TOKENS = "(16384, 2048) bf16", "bfloat16 (8192, 2048)"
_LINALG, _LARGE = "ours (linalg)", "1 x 1024^2, i^-1 and"
_IN_PLACE, _TRACE = "MoCa forward in place, (16384, 2048) bf16", "Tr((AB)^(1/2)), one pair of 1024 x 1024"
_MIR = "MIR of states in memory, 2 layers, d = 1024"
HEADLINES = (
    Headline(_IN_PLACE, _MOCA, "moca forward in place", _STATES, "ours, native", "published formula"),
    Headline(_IN_PLACE, _MOCA, "moca forward in place", _STATES, "ours, native", "torch.compile(where)"),
    Headline(
        "add + MoCa + RMSNorm", _MOCA, "add_moca_rms_norm forward", _STATES, "ours, native", "torch.compile(separate)"
    ),
    Headline(
        "covariance, (8192, 2048) bf16", _MOMENTS, "covariance", _TOKENS, "ours, auto, native", "torch.cov, float32"
    ),
    Headline(
        "token norms, (8192, 2048) bf16", _MOMENTS, "token_norms", _TOKENS, "ours, native",
        "torch.linalg.vector_norm, bf16",
    ),
    Headline(_TRACE, _SQRTM, "trace_sqrt_product", _LARGE, _LINALG, "torchmetrics (eigvals of AB)"),
    Headline(
        "the same, one pair of 64 x 64", _SQRTM, "trace_sqrt_product", "1 x 64^2", _LINALG,
        "LAPACK: potrf + sygst + eigvalsh",
    ),
    Headline(_MIR, "mir_cpu", "mir", "2 layers, d 1024", "mir_kernels, streamed", "published, fast"),
    Headline(_MIR, "mir_cpu", "mir", "2 layers, d 1024", "mir_kernels, streamed", "published, accurate (scipy)"),
    Headline(
        "MIR of a stream of LLaVA-1.5-7B's shape, both 1 layer, time x 32", "mir_streamed_cpu", "mir of a stream",
        "32 layers, d 4096", "mir_kernels, value only", "published, accurate (scipy); 1 layer, time x 32",
    ),
)  # fmt: skip


def lines(read: Callable[[str], list[dict[str, Any]]]) -> list[str]:
    """The table in Markdown; read(name) returns the rows of benchmarks/data/<name>.csv.

    KeyError if a CSV lacks one of the rows.
    """
    table = ["| job | against | times as fast | our error | its error |", "| --- | --- | ---: | ---: | ---: |"]
    for headline in HEADLINES:
        rows = {
            row["rival"]: row
            for row in read(headline.csv)
            if row["operation"] == headline.operation and row["case"].startswith(headline.case)
        }
        ours, rival = rows[headline.ours], rows[headline.rival]
        speed = rival["p50_ms"] / ours["p50_ms"]
        cells = (
            headline.job,
            headline.rival.partition(";")[0],
            f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}",
            *(f"{error:.0e}" if error else "0" for error in (ours["error"], rival["error"])),
        )
        table.append(f"| {' | '.join(cells)} |")
    return table
