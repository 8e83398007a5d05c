"""If Triton is too old for the kernels, `backends()` says so, and so does the error if it is requested."""

import sys
import types

import pytest
import torch

import mir_kernels
from mir_kernels import _dispatch

TOO_OLD = "triton 3.3.1 is older than 3.4, which the kernels require"


def stand_in(monkeypatch, **attributes):
    module = types.ModuleType("triton")
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, "triton", module)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_old_triton_is_named_for_every_operation_that_has_such_kernels(monkeypatch, device):
    stand_in(monkeypatch, __version__="3.3.1")
    reasons = [by_device[device].get("triton") for by_device in mir_kernels.backends().values()]
    reasons = [why for why in reasons if why is not None]
    assert reasons
    assert set(reasons) == {TOO_OLD}


def test_asked_for_by_name_it_is_refused_with_the_reason(monkeypatch):
    stand_in(monkeypatch, __version__="3.3.1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=TOO_OLD):
        mir_kernels.sqrtm(torch.eye(3), backend="triton")
    assert torch.equal(mir_kernels.sqrtm(torch.eye(3)), torch.eye(3))  # other backends still run


@pytest.mark.parametrize("attributes", [{}, {"__version__": "unknown"}])
def test_what_is_no_triton_but_has_its_name_is_not_taken_for_one(monkeypatch, attributes):
    stand_in(monkeypatch, **attributes)
    why = _dispatch.REASONS["triton"](torch.device("cpu"))
    assert why.startswith("triton is not installed (the imported module named triton has version ")


@pytest.mark.parametrize("version", ["3.4.0", "3.4.0+git2b3c4d", "3.10.0", "4.0.0.dev20260101"])
def test_later_versions_are_taken(monkeypatch, version):
    stand_in(monkeypatch, __version__=version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.REASONS["triton"](torch.device("cpu")) is None
