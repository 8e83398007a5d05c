"""Every fuzz target on a few fixed damaged files and inputs; `make fuzz` runs more."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, seed, settings

from fuzz import run
from fuzz.inputs import INPUTS
from fuzz.mutations import damaged
from fuzz.targets import TARGETS


def test_make_fuzz_runs_every_target():
    assert set(run.FILES) == set(TARGETS)
    assert set(run.INPUTS) == set(INPUTS)


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_by_name_or_read_right(name):
    for number, whole in enumerate(TARGETS[name].seeds()):
        for data in damaged(whole, 20, number):
            TARGETS[name].check(data)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_refused_by_name_or_counted_right(name):
    few = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    assert few(seed(0)(INPUTS[name]))() is None


def test_the_driver_runs_and_counts():
    command = [sys.executable, run.__file__, "--target", "moments-edits", "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rpartition("units: ")[2]) >= 200
