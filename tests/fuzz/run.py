"""`make fuzz`: run every target for FUZZ_SECONDS in a separate process. Exits with 1 on a finding, and prints it.

File targets (targets.py) are driven by atheris, which follows coverage from valid and damaged files; input targets
(inputs.py) by hypothesis, which shrinks its findings.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FILES = ("states", "metric-state", "signed-metric-state", "run-checkpoint", "result", "moca", "moca-torch")
INPUTS = ("moca-inputs", "trace-inputs", "update", "moments-update", "metric-edits", "moments-edits")
INPUTS += ("layouts", "rewritten-masks", "not-finite")
SLOWEST = 60  # seconds for one execution: more is a hang
MEMORY_MB = 4096


def run_file(name: str, seconds: int) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["modality_integration", "mir_kernels"], enable_loader_override=False):
        from fuzz.targets import TARGETS
    from fuzz.mutations import damaged

    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    for number, whole in enumerate(TARGETS[name].seeds()):
        for i, data in enumerate(damaged(whole, 30, number)):
            (corpus / f"{number}-{i}").write_bytes(data)
    limits = [f"-max_total_time={seconds}", f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY_MB}", "-max_len=200000"]
    folder = f"-artifact_prefix={corpus}/finding-"
    atheris.Setup(
        [sys.argv[0], *limits, "-print_final_stats=1", "-verbosity=0", folder, str(corpus)], TARGETS[name].check
    )
    atheris.Fuzz()


def run_inputs(name: str, seconds: int) -> None:
    """Rounds of new examples until time is up."""
    from hypothesis import HealthCheck, seed, settings

    from fuzz import inputs

    count, began, number = 0, time.monotonic(), 0
    test = inputs.INPUTS[name]
    inner = test.hypothesis.inner_test

    def counting(data: object) -> None:
        nonlocal count
        count += 1
        inner(data)

    test.hypothesis.inner_test = counting
    profile = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    test = profile(test)
    while time.monotonic() - began < seconds:
        number += 1
        seed(number)(test)()
    print(f"stat::number_of_executed_units: {count}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=int, default=int(os.environ.get("FUZZ_SECONDS", "60")), help="time for each target"
    )
    parser.add_argument("--target", choices=(*FILES, *INPUTS), help="run only this target, in this process")
    flags = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    if flags.target:
        (run_file if flags.target in FILES else run_inputs)(flags.target, flags.seconds)
        return 0
    found = 0
    for name in (*FILES, *INPUTS):
        command = [sys.executable, __file__, "--target", name, "--seconds", str(flags.seconds)]
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "PYTHONWARNINGS": "ignore", "TMPDIR": folder}
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env)
        output = done.stdout + done.stderr
        counts = re.findall(r"stat::number_of_executed_units: (\d+)", output)
        clean = done.returncode == 0 and bool(counts)
        print(
            f"{name:<22}{counts[-1] if counts else '?':>10} executions, {'clean' if clean else 'FINDING'}", flush=True
        )
        if not clean:
            found += 1
            print(output[-8000:], flush=True)
    print(f"{len(FILES + INPUTS) - found} passed, {found} failed")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
