"""benchmarks/stream_memory.py on a small shape: the parts are the tensors' and add up to the peak."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from mir_kernels.moments.packed import entries

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_parts_are_those_of_the_shape_and_add_up(tmp_path):
    layers, d, samples, vision, text = 2, 64, 80, 30, 20  # vision outgrows what is held back, text does not
    shape = {"layers": layers, "hidden": d, "samples": samples, "vision": vision, "text": text}
    flags = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "benchmarks/stream_memory.py", *flags, "--out", str(tmp_path / "memory.csv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "memory.csv").open(newline="") as file:
        parts = {row["part"]: float(row["mb"]) for row in csv.DictReader(file)}
    counted = samples * (vision + text) * layers
    assert parts["for comparison: all features kept, bf16"] == pytest.approx(counted * d * 2 / 1e6, abs=0.06)
    triangles = 8 * layers * (entries(d) + 3 * d) / 1e6
    assert parts["accumulators: means and triangles, float64"] == pytest.approx(triangles, abs=0.06)
    names = list(parts)
    assert sum(parts[name] for name in names[:6]) == pytest.approx(parts["peak while streaming"], abs=0.5)
