"""The predicted times follow from the counts, are labelled as predictions, and are shown next to measured rows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import counts
import harness
import roofline
from mir_kernels.ops.frechet.iterated import RUNGS
from mir_kernels.ops.frechet.report import TOLERANCE
from mir_kernels.ops.sqrtm import float64

ROOT = Path(__file__).parent.parent


def test_counts_are_those_of_the_tensors():
    rows, vision, d = 10, 4, 8
    assert counts.moca_forward_in_place(rows, vision, d).bytes == 2 * vision * d * 2
    assert counts.moca_forward(rows, vision, d).bytes == 2 * rows * d * 2
    assert counts.moca_backward(rows, vision, d).bytes == (2 * rows + vision) * d * 2
    assert counts.add_moca_rms_norm_backward(rows, vision, d).bytes == (4 * rows + 2 * vision) * d * 2
    assert counts.covariance(rows, d) == (2 * rows * d + 8 * d * (d + 1), rows * d * (d + 1))
    assert counts.covariance(rows, d).times(3) == tuple(3 * v for v in counts.covariance(rows, d))
    assert counts.polar_step(d).flops == 2 * (2 * d * (d * (d + 1) // 2)) + 2 * d**3


def test_time_is_the_longer_of_bytes_and_operations():
    gpu = roofline.Gpu(1000, 100, 10, "made up")
    reached = roofline.REACHED
    assert roofline.seconds(counts.Count(10**12, 1), gpu) == pytest.approx(1 / reached["bandwidth"])
    assert roofline.seconds(counts.Count(1, 10**14), gpu) == pytest.approx(1 / reached["bf16"])
    assert roofline.seconds(counts.Count(1, 10**13), gpu, "float64") == pytest.approx(1 / reached["float64"])


def test_more_tokens_and_layers_take_as_much_longer():
    gpu = roofline.GPUS["H100"]
    one, two = roofline.mir_time(gpu, 1, 4096, 64_000), roofline.mir_time(gpu, 2, 4096, 64_000)
    assert two.total == pytest.approx(2 * one.total)
    assert roofline.mir_time(gpu, 1, 4096, 128_000).tokens == pytest.approx(2 * one.tokens)


def test_the_default_precision_takes_longer_only_in_its_polar_steps():
    gpu = roofline.GPUS["A100"]
    fine, rough = (roofline.mir_time(gpu, 32, 4096, 64_000, precision) for precision in ("float32", "bfloat16"))
    assert fine.polar > 3 * rough.polar
    assert fine._replace(polar=0) == rough._replace(polar=0)
    assert fine == roofline.mir_time(gpu, 32, 4096, 64_000)
    assert set(roofline.GRADES) <= set(TOLERANCE)
    assert roofline.GRADES["bfloat16"] == RUNGS["bfloat16"][0]


def test_split_products_are_counted_as_they_are_made_and_pay_where_float64_is_slow():
    assert (counts.SPLIT_PARTS, counts.SPLIT_BLOCK) == (float64.PARTS, float64.BLOCK)
    d = 4096
    wide = counts.trace_factors(d).flops + counts.trace_certificate(d).flops
    assert counts.trace_split(d).flops == 45 * (wide - d**3 // 3)
    for gpu in roofline.WITHOUT_FLOAT64.values():
        assert gpu.int8 > 0
        assert gpu.float64 < gpu.bf16 / 64
        found = roofline.without_float64(gpu, 32, d, 64_000)
        assert found.split < found.float64 / 3
        whole = roofline.mir_time(gpu, 32, d, 64_000)
        assert found.rest + found.float64 == pytest.approx(whole.total)


def test_a_loop_that_waits_allows_a_part_of_the_rate_and_one_that_runs_ahead_all_of_it():
    ahead = {"products": 12, "columns": 128, "in_flight": 3, "lines": 275}
    assert roofline.loop_share(ahead, 8) == 1.0
    assert roofline.loop_share(ahead | {"lines": 2 * 768}, 8) == pytest.approx(0.5)  # its threads are the slower part
    waits = {"products": 6, "columns": 128, "in_flight": 0, "lines": 579}  # float32 operands split in registers
    assert roofline.loop_share(waits, 8) == pytest.approx(768 / (768 + 1158))
    shares = roofline.loops()
    assert {"polar 1024 float32 product", "second moment split 4096 bfloat16"} <= set(shares)
    assert min(shares.values()) > 0.8


def test_a_measured_row_stands_beside_its_prediction(tmp_path):
    case = roofline.kernels()["moca backward"][0] + " bf16, 8192 vision rows"
    row = dict.fromkeys(harness.COLUMNS) | {"operation": "moca backward", "case": case, "device": "a GPU"}
    rows = [row | {"rival": name, "p50_ms": ms} for name, ms in (("ours, cuda", 0.25), ("published formula", 0.1))]
    harness.write_csv(rows, tmp_path / "moca_cuda.csv")
    text = roofline.report(100, 576, 64, [tmp_path / "moca_cuda.csv"])
    (line,) = (line for line in text.splitlines() if line.startswith("| moca backward"))
    assert line.endswith("| 0.25 ms on a GPU |")


def test_a_measured_mir_stands_beside_its_total(tmp_path):
    row = dict.fromkeys(harness.COLUMNS) | {"operation": "mir", "device": "a GPU", "p50_ms": 900.0}
    case = roofline.mir_case(32, 4096, 100, 576, 64)
    harness.write_csv([row | {"rival": "mir_kernels, streamed", "case": case}], tmp_path / "mir_cuda.csv")
    text = roofline.report(100, 576, 64, [tmp_path / "mir_cuda.csv"])
    (line,) = (line for line in text.splitlines() if "900 ms" in line)
    assert line.startswith("| 7B (32 layers, d = 4096), total in float32 (the default) |")
    shape = {"layers": 32, "hidden": 4096, "samples": 100, "vision": 576, "text": 64}
    pattern = re.search(r'f"(\{flags.layers\} layers.*?)"', (ROOT / "benchmarks" / "bench_mir.py").read_text())[1]
    assert re.sub(r"\{flags\.(\w+)\}", lambda m: str(shape[m[1]]), pattern) == case


def test_the_script_says_that_it_predicts():
    command = [sys.executable, str(ROOT / "benchmarks" / "roofline.py"), "--samples", "10"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("PREDICTION, not a measurement.")
    assert all(
        name in printed for name in ("A100", "H100", "H200", "B200", "RTX 4090", "7B", "13B", "34B", "MIR, 10 samples")
    )
