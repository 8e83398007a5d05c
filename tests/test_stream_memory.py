"""benchmarks/stream_memory.py on a small shape: the parts match the tensors, and little else uses memory."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from mir_kernels.ops.moments.packed import entries

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_parts_are_those_of_the_shape_and_make_up_the_peak(tmp_path):
    layers, d, samples, vision, text = 4, 1024, 20, 300, 120
    shape = {"layers": layers, "hidden": d, "samples": samples, "vision": vision, "text": text}
    flags = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "benchmarks/stream_memory.py", *flags, "--out", str(tmp_path / "memory.csv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "memory.csv").open(newline="") as file:
        parts = {row["part"]: float(row["mb"]) for row in csv.DictReader(file)}
    features = samples * (vision + text) * layers * d * 2 / 1e6
    assert parts["for comparison: all features kept, bf16"] == pytest.approx(features, abs=0.06)
    # Both modalities have more rows than the buffer of rows held back, so it is full.
    triangle = 8 * (entries(d) + 3 * d) / 1e6
    assert parts["accumulators: means and triangles, float64"] == pytest.approx(2 * layers * triangle, abs=0.06)
    assert parts["rows held back"] == pytest.approx(2 * layers * 2048 * d * 2 / 1e6, abs=0.06)
    stays, moves = "groups=5, 1 layer, on a CPU: ", "groups=5, 1 layer, moving: "
    # All text of the last group is held back.
    assert parts[f"{stays}accumulators: means and triangles, float64"] == pytest.approx(2 * 5 * triangle, abs=0.12)
    assert parts[f"{moves}accumulators on the device, at most at once"] == pytest.approx(2 * triangle, abs=0.06)
    assert parts[f"{moves}put into the host's memory"] > 2 * 3 * triangle
    # One block of a layer as packed floats, plus memory kept by the allocator; all features would not fit.
    assert -1 < parts["rest: copies of a layer's rows, products"] < 45 < features
    assert parts["peak while streaming"] <= parts["peak in compute()"] < parts["peak while streaming"] + 150
