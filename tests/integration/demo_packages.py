"""Skip mark for tests that need the pictures and weights of the demo's packages."""

import importlib.util

import pytest

from modality_integration.app.demo.packages import PACKAGES


def needs(*modules):
    """Skip unless the demo's packages, and `modules`, are installed."""
    absent = [name for name in (*PACKAGES, *modules) if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}")
