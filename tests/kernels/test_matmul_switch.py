"""The switch of float32 products: full float32 inside, and afterwards every observable setting is restored."""

import itertools
import sys
import threading

import pytest
import torch

from kernels.matmul_settings import (
    DEVICES,
    FULL,
    HAS_TREE,
    NODES,
    OLD,
    VALUES,
    get,
    in_force,
    observe,
    old_getters,
    put,
    start,
    starts,
    tree,
)
from mir_kernels import _matmul_switch
from mir_kernels._matmul_switch import OneValue, full_float32, own_value

pytestmark = pytest.mark.usefixtures("default_settings")


@tree
@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_what_is_set_itself_is_told_from_what_is_inherited(backend):
    for generic, every, own in itertools.product(VALUES["generic"], VALUES[backend], VALUES[backend]):
        settings = {"generic": generic, backend: every, f"{backend}_matmul": own}
        start(**settings)
        assert own_value(backend) == own
        assert own_value(backend, "all") == every
        found = observe()
        start(**settings)
        assert observe() == found


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_every_state_is_full_inside_and_the_same_afterwards(backend):
    for settings in starts(backend):
        start(**settings)
        before = observe()
        start(**settings)
        getters, reduced = old_getters(), in_force(backend) not in FULL
        own = [get(*node) for node in NODES] if HAS_TREE else []
        with full_float32(DEVICES[backend]):
            assert in_force(backend) in FULL
            assert ("contradiction" not in old_getters()) or "contradiction" in getters
            for found, known in zip(old_getters(), getters, strict=True):
                assert found != "contradiction" or known == "contradiction"
            with full_float32(DEVICES[backend]):
                assert in_force(backend) in FULL
            assert in_force(backend) in FULL
            if not reduced and HAS_TREE:
                assert [get(*node) for node in NODES] == own
        assert observe() == before, settings


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_an_exception_restores_too(backend):
    for settings in starts(backend):
        start(**settings)
        before = observe()
        start(**settings)
        with pytest.raises(KeyError), full_float32(DEVICES[backend]), full_float32(DEVICES[backend]):
            raise KeyError
        assert observe() == before, settings


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
@pytest.mark.parametrize("settings", [{"old": "medium"}, *([{"generic": "tf32"}] if HAS_TREE else [])])
def test_an_interrupt_on_the_way_in_restores_too(backend, settings):
    """Interrupts at every line between the call and the body of the statement."""

    def is_way_out(frame) -> bool:
        return frame is not None and (frame.f_code.co_name == "back_to" or is_way_out(frame.f_back))

    def interrupted_at(count: int) -> bool:
        left = count

        def trace(frame, event, _):
            nonlocal left
            if frame.f_globals.get("__name__") != _matmul_switch.__name__ or is_way_out(frame):
                return None
            left -= event == "line"
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with full_float32(DEVICES[backend]):
                sys.settrace(None)
                return False
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            # A trace function can raise when `with` is about to release the lock. A signal handler cannot, because it
            # runs after a call. A lock that stays held would block the threads of later tests.
            while _matmul_switch._LOCK._is_owned():
                _matmul_switch._LOCK.release()

    start(**settings)
    before = observe()
    lines = 0
    while True:
        start(**settings)
        if not interrupted_at(lines):
            break
        assert not any(switch.users for switch in _matmul_switch.SWITCHES.values()), lines
        assert observe() == before, lines
        lines += 1
    assert lines > 10


CHANGES = {
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "old flag": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
}
if HAS_TREE:
    CHANGES |= {
        "ieee": lambda: [put(backend, "matmul", "ieee") for backend in DEVICES],
        "tf32": lambda: [put(backend, "matmul", "tf32") for backend in DEVICES],
        "parents tf32": lambda: put("generic", "all", "tf32"),
        "parents ieee": lambda: put("generic", "all", "ieee"),
        "cuda tf32": lambda: put("cuda", "all", "tf32"),
        "mkldnn bf16": lambda: put("mkldnn", "all", "bf16"),
    }


@tree
@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"old": "high", "cuda_matmul": "tf32", "mkldnn_matmul": "tf32"},
        {"old": "medium", "cuda_matmul": "tf32", "mkldnn_matmul": "bf16"},
        {"cuda_matmul": "tf32", "mkldnn_matmul": "bf16"},
    ],
    ids=str,
)
def test_what_another_thread_sets_meanwhile_is_left_alone(backend, change, settings):
    start(**settings)
    CHANGES[change]()
    expected = [get(*node) for node in NODES] + [own_value(name) for name in DEVICES] + [old_getters()]
    start(**settings)
    with full_float32(DEVICES[backend]):
        thread = threading.Thread(target=CHANGES[change])
        thread.start()
        thread.join()
    found = [get(*node) for node in NODES] + [own_value(name) for name in DEVICES] + [old_getters()]
    if change == "ieee" and backend == "cuda" and "old" in settings:
        # "highest" sets the same value, so the old getters do not contradict it.
        assert found.pop() == ("highest", False)
        expected.pop()
    assert found == expected


@tree
@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_who_enters_after_a_change_is_full_and_gives_the_change_back(backend):
    start(old="high", cuda_matmul="tf32", mkldnn_matmul="tf32")
    with full_float32(DEVICES[backend]):
        torch.set_float32_matmul_precision("medium")
        with full_float32(DEVICES[backend]):
            assert in_force(backend) in FULL
        assert in_force(backend) in FULL  # the outer context shares the setting of the inner one
    assert (get("cuda", "matmul"), get("mkldnn", "matmul")) == ("tf32", "bf16")
    assert old_getters() == ("medium", True)


@tree
def test_no_thread_sees_the_look_at_what_is_inherited():
    start(generic="tf32", mkldnn="tf32")
    found, done = set(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            found.add((get("generic", "all"), get("mkldnn", "all"), get("cuda", "all")))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=watch)
    try:
        thread.start()
        for _ in range(3000):
            own_value("mkldnn")
            own_value("cuda")
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
    assert found == {("tf32", "tf32", "tf32")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("old", OLD)
def test_the_one_value_of_older_torch(device, old):
    switch, reduced = OneValue(), old == "medium" or (old == "high" and device == "cuda")
    torch.set_float32_matmul_precision(old)
    switch.enter("one", torch.device(device))
    switch.enter("other", torch.device(device))
    assert torch.get_float32_matmul_precision() == ("highest" if reduced else old)
    switch.back_to("one", 0)
    assert torch.get_float32_matmul_precision() == ("highest" if reduced else old)
    switch.back_to("other", 0)
    assert torch.get_float32_matmul_precision() == old
    assert not switch.users
    if reduced:
        switch.enter("one", torch.device(device))
        torch.set_float32_matmul_precision("high")
        switch.back_to("one", 0)
        assert torch.get_float32_matmul_precision() == "high"
