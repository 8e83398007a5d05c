"""Threads that share a StreamingMoments, read it while it grows, merge in both directions, or have one each."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mir_kernels import StreamingMoments

D, ROWS, CALLS, THREADS = 5, 37, 60, 6


@pytest.fixture(autouse=True)
def switching_often():
    """Switch threads every microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def tokens(thread, call):
    generator = torch.Generator().manual_seed(1000 * thread + call)
    return torch.randn(ROWS, D, generator=generator, dtype=torch.float64) + thread


def in_threads(work):
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


def agrees(moments, threads=range(THREADS)):
    every = torch.cat([tokens(thread, call) for thread in threads for call in range(CALLS)])
    assert moments.count == len(every)
    torch.testing.assert_close(moments.mean, every.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.covariance(), every.T.cov(), rtol=1e-12, atol=1e-12)


def test_updates_of_one_object_by_several_threads_are_all_there():
    moments = StreamingMoments(D, precision="exact")
    in_threads(lambda thread: [moments.update(tokens(thread, call)) for call in range(CALLS)])
    agrees(moments)


def test_masked_updates_by_several_threads_are_all_there():
    moments, mask = StreamingMoments(D, precision="exact"), torch.arange(2 * ROWS) < ROWS

    def work(thread):
        for call in range(CALLS):
            moments.update(
                torch.cat([tokens(thread, call), torch.full((ROWS, D), torch.nan, dtype=torch.float64)]), mask
            )

    in_threads(work)
    agrees(moments)


def test_reading_while_others_update_sees_whole_updates():
    moments = StreamingMoments(D, precision="exact")

    def work(thread):
        for call in range(CALLS):
            moments.update(tokens(thread, call))
            assert moments.count % ROWS == 0
            assert torch.isfinite(moments.covariance()).all()
            for other in (copy.deepcopy(moments), StreamingMoments(D, precision="exact")):
                other.load_state_dict(moments.state_dict())
                assert other.count % ROWS == 0

    in_threads(work)
    agrees(moments)


def test_one_object_a_thread_merged_at_the_end_is_the_same():
    def work(thread):
        moments = StreamingMoments(D, precision="exact")
        for call in range(CALLS):
            moments.update(tokens(thread, call))
        return moments

    total = StreamingMoments(D, precision="exact")
    for moments in in_threads(work):
        total.merge(moments)
    agrees(total)


def test_threads_may_merge_into_one_object():
    total = StreamingMoments(D, precision="exact")

    def work(thread):
        for call in range(CALLS):
            moments = StreamingMoments(D, precision="exact")
            moments.update(tokens(thread, call))
            total.merge(moments)

    in_threads(work)
    agrees(total)


def test_two_objects_merged_into_one_another_do_not_wait_for_ever():
    pair = [StreamingMoments(D), StreamingMoments(D)]
    for moments in pair:
        moments.update(torch.ones(2, D))

    def work(thread):
        for _ in range(5):
            pair[thread % 2].merge(pair[1 - thread % 2])

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(work, thread) for thread in range(2)]
        for one in done:
            one.result(timeout=60)
    assert all(moments.count > 2 for moments in pair)


@pytest.mark.parametrize(
    "travel", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu")]
)
def test_copies_have_a_lock_of_their_own(travel):
    moments = StreamingMoments(D, precision="exact")
    moments.update(tokens(0, 0))
    other = travel(moments)
    assert other is moments or other._lock is not moments._lock
    assert other.count == ROWS
    assert torch.equal(other.covariance(), moments.covariance())
