"""Process-wide settings do not affect the operations, and these do not change them, also in threads and forks."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernels.matmul_settings import (
    CPU,
    DEVICES,
    FULL,
    HAS_TREE,
    get,
    in_force,
    old_getters,
    start,
    tree,
)
from mir_kernels import StreamingMoments, _matmul_switch, newton_schulz, polar, sqrtm, trace_sqrt_product
from mir_kernels._matmul_switch import full_float32, own_value
from mir_kernels._precision import float32_products
from mir_kernels.ops.sqrtm import eager, float64

pytestmark = pytest.mark.usefixtures("default_settings")


def test_a_product_on_the_cpu_leaves_the_gpu_its_setting():
    start(old="high")
    torch.set_float32_matmul_precision("high")
    with full_float32(CPU):
        assert in_force("cuda") == "tf32"
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("old", ["high", "medium"])
def test_threads_that_come_and_go_all_compute_in_full(old):
    torch.set_float32_matmul_precision(old)
    before = [own_value(backend) for backend in DEVICES] if HAS_TREE else []
    wrong = []

    def work(seed: int) -> None:
        for i in range(60):
            backend = ("cuda", "mkldnn")[(seed + i) % 3 == 0]
            with full_float32(DEVICES[backend]):
                time.sleep(1e-4 * ((seed * 7 + i) % 4))
                with full_float32(DEVICES["mkldnn"]):
                    wrong.extend(b for b in {backend, "mkldnn"} if in_force(b) not in FULL)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert not wrong
    assert ([own_value(backend) for backend in DEVICES] if HAS_TREE else []) == before
    assert old_getters() == (old, True)


def test_roots_in_threads_never_run_under_less_and_lose_no_setting(monkeypatch):
    seen, product = set(), eager.product
    monkeypatch.setattr(eager, "product", lambda *a, **k: (seen.add(in_force("mkldnn")), product(*a, **k))[1])
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    a = x.T @ x / 300
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: sqrtm((a + a.mT) / 2, method="polar"), range(40)))
    assert seen
    assert seen <= set(FULL)
    assert old_getters() == ("medium", True)
    assert in_force("cuda") not in FULL


def operations() -> dict:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    a = (x.T @ x / 40 + torch.eye(8)).double()

    def gradient() -> None:
        m = x.clone().requires_grad_()
        polar(m).sum().backward()

    def moments() -> None:
        held = StreamingMoments(8, backend="eager")
        held.update(x)
        held.covariance()

    return {
        "polar": lambda: polar(x),
        "polar in 16 bits": lambda: polar(x, precision="bfloat16"),
        "sqrtm": lambda: sqrtm(a, method="polar"),
        "coupled": lambda: newton_schulz(a, iterations=9),
        "trace": lambda: trace_sqrt_product(a, a, backend="eager"),
        "gradient": gradient,
        "moments": moments,
    }


@tree
@pytest.mark.parametrize("name", operations())
def test_a_later_setting_above_still_reaches_the_products(name):
    run = operations()[name]
    torch.backends.fp32_precision = "tf32"
    run()
    assert [own_value(backend) for backend in DEVICES] == ["none", "none"]
    torch.backends.fp32_precision = "ieee"
    assert [get(backend, "matmul") for backend in DEVICES] == ["ieee", "ieee"]


def refuse(*_: object) -> None:
    raise AssertionError("the process's setting was touched")


def nothing_may_be_set(monkeypatch) -> None:
    monkeypatch.setattr(_matmul_switch.OneValue, "set", refuse)
    monkeypatch.setattr(_matmul_switch.Matmul, "set", refuse)
    monkeypatch.setattr(_matmul_switch, "_set", refuse)


@pytest.mark.parametrize("name", operations())
def test_nothing_is_set_where_products_are_full_anyway(name, monkeypatch):
    nothing_may_be_set(monkeypatch)
    operations()[name]()


@pytest.mark.parametrize("run", [
    lambda x: polar(x, precision="float64"),
    lambda x: sqrtm(x.T @ x),
    lambda x: sqrtm((x.T @ x).double(), method="polar", precision="float64"),
    lambda x: newton_schulz(x.T @ x + torch.eye(8), iterations=20, precision="float64"),
])  # fmt: skip
def test_nothing_is_set_for_float64(run, monkeypatch):
    x = torch.randint(-3, 4, (40, 8), generator=torch.Generator().manual_seed(0)).float()
    torch.set_float32_matmul_precision("medium")
    nothing_may_be_set(monkeypatch)
    run(x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("also_here", [False, True], ids=["another thread", "this thread too"])
@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_a_fork_while_another_thread_is_inside_leaves_the_child_its_setting(backend, also_here):
    torch.set_float32_matmul_precision("medium")
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with full_float32(DEVICES[backend]):
            entered.set()
            leave.wait()

    def fork_and_look(expect_full: bool) -> int:
        child = os.fork()
        if child == 0:
            try:
                right = (in_force(backend) in FULL) == expect_full
                with full_float32(DEVICES[backend]):
                    right = right and in_force(backend) in FULL
                os._exit(0 if right else 1)
            finally:
                os._exit(2)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return -1

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait()
    try:
        if also_here:
            with full_float32(DEVICES[backend]):
                assert fork_and_look(expect_full=True) == 0
        else:
            assert fork_and_look(expect_full=False) == 0
        assert in_force(backend) in FULL  # in this process the thread is still inside the context
    finally:
        leave.set()
        thread.join()
    assert old_getters() == ("medium", True)
    assert in_force(backend) not in FULL


def test_autocast_is_off_inside_and_as_it_was_afterwards():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    expected = polar(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with float32_products(CPU):
            assert not torch.is_autocast_enabled("cpu")
            assert (x @ x.T).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
        assert (x @ x.T).dtype == torch.bfloat16
        assert torch.equal(polar(x), expected)


def test_split_products_of_one_thread_are_no_others():
    found = {}
    with float64.split_products():
        thread = threading.Thread(target=lambda: found.update(there=float64.is_split(CPU)))
        thread.start()
        thread.join()
        with float64.split_products(False):
            found["nested"] = float64.is_split(CPU)
        found["here"] = float64.is_split(CPU)
    found["afterwards"] = float64.is_split(CPU)
    assert found == {"there": False, "nested": False, "here": True, "afterwards": False}
