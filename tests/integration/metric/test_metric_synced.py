"""Synced metrics: after any exception the metric is as before; while synced, updates that would be lost raise errors.

Two processes are simulated by a gather that returns its own tensor twice.
"""

import copy
import warnings

import pytest
import torch
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from integration.metric.streams import fed, sample
from modality_integration import ModalityIntegrationRate
from modality_integration.metric import streaming


class TwoProcesses:
    """A gather of two processes with the same tokens, which fails at a given call."""

    def __init__(self):
        self.calls, self.breaks_at, self.failed_elsewhere = 0, None, False

    def __call__(self, tensor, group=None):
        self.calls += 1
        if self.calls == self.breaks_at:
            raise ConnectionError("the other process is gone")
        told_apart = tensor.shape == (1,) and self.failed_elsewhere
        return [tensor, torch.ones_like(tensor) if told_apart else tensor.clone()]


def synced_metric(seeds=range(4), **options):
    gather = TwoProcesses()
    options = {"dist_sync_fn": gather, "distributed_available_fn": lambda: True, "hold": 60, **options}
    return fed([sample(seed) for seed in seeds], **options), gather


def own_state(metric):
    assert not metric._is_synced
    assert metric._cache is None
    return {key: value.clone() for key, value in metric.state_dict().items()} | {"updates": metric.update_count}


def assert_as_before(metric, before):
    after = own_state(metric)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value) if isinstance(value, torch.Tensor) else after[key] == value, key


def raising(error):
    def raises(*args):
        raise error

    return raises


def text_only():
    hidden, vision, text = sample(0)
    return hidden, torch.zeros_like(vision), text


def doubled(seeds=range(4)):
    return fed([sample(seed) for seed in seeds for _ in range(2)], hold=60).compute()


def assert_counts_of_both(metric, seeds=range(4)):
    result = metric.compute()
    assert result.kept == doubled(seeds).kept
    assert not metric._is_synced


def test_a_compute_that_raises_leaves_the_metric_with_its_own_tokens():
    metric, _ = synced_metric([])
    metric.update(*text_only())
    before = own_state(metric)
    for _ in range(2):
        with pytest.raises(ValueError, match="no token of vision"):
            metric.compute()
        assert_as_before(metric, before)
    metric.update(*sample(1))
    assert metric.compute().kept == fed([text_only(), sample(1)] * 2, hold=60).compute().kept


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
def test_any_exception_within_compute_does(error, monkeypatch):
    metric, _ = synced_metric()
    before = own_state(metric)
    with monkeypatch.context() as patched:
        patched.setattr(streaming, "layer_results", raising(error("no more")))
        with pytest.raises(error, match="no more"):
            metric.compute()
    assert_as_before(metric, before)
    assert_counts_of_both(metric)


def test_a_gather_that_breaks_anywhere_leaves_the_metric_with_its_own_tokens():
    metric, gather = synced_metric()
    before, expected = own_state(metric), metric.compute()
    for call in range(1, gather.calls + 1):
        metric._computed, gather.calls, gather.breaks_at = None, 0, call
        with pytest.raises(ConnectionError):
            metric.compute()
        assert_as_before(metric, before)
        if call % 10 == 1:
            gather.breaks_at = None
            assert metric.compute() == expected


def test_sync_by_hand_that_breaks_changes_nothing():
    metric, gather = synced_metric()
    before, gather.breaks_at = own_state(metric), 3
    with pytest.raises(ConnectionError):
        metric.sync(dist_sync_fn=gather)
    assert_as_before(metric, before)
    with pytest.raises(TorchMetricsUserError, match="already been un-synced"):
        metric.unsync()


def test_a_sync_context_left_by_an_exception_is_left():
    metric, gather = synced_metric()
    before = own_state(metric)
    with pytest.raises(ZeroDivisionError), metric.sync_context(dist_sync_fn=gather):  # noqa: PT012
        assert metric._is_synced
        raise ZeroDivisionError
    assert_as_before(metric, before)


def test_where_one_process_fails_none_has_a_result():
    metric, gather = synced_metric()
    before, gather.failed_elsewhere = own_state(metric), True
    with pytest.raises(RuntimeError, match="failed on process 1, so no process has a result"):
        metric.compute()
    assert_as_before(metric, before)
    gather.failed_elsewhere = False
    assert_counts_of_both(metric)


def test_a_forward_that_raises_changes_nothing_whether_its_batch_is_synced_or_not():
    for on_step in (False, True):
        metric, gather = synced_metric(dist_sync_on_step=on_step)
        before = own_state(metric)
        with pytest.raises(ValueError, match="no token of vision"):
            metric(*text_only())
        assert_as_before(metric, before)
        gather.calls, gather.breaks_at = 0, 2 if on_step else None
        if on_step:
            with pytest.raises(ConnectionError):
                metric(*sample(5))
            assert_as_before(metric, before)
            gather.breaks_at = None
        assert metric(*sample(5)).kept["text"][0] == (1 + on_step) * fed([sample(5)]).compute().kept["text"][0]
        assert metric.update_count == before["updates"] + 1


REFUSED = {
    "update()": lambda metric: metric.update(*sample(9)),
    "forward()": lambda metric: metric(*sample(9)),
    "merge_state()": lambda metric: metric.merge_state(fed([sample(9)], hold=60)),
    "load_state_dict()": lambda metric: metric.load_state_dict(fed([sample(9)], hold=60).state_dict()),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_unsync_would_lose_is_refused_while_synced(call):
    metric, gather = synced_metric()
    before = own_state(metric)
    metric.sync(dist_sync_fn=gather)
    synced = metric.state_dict()
    with pytest.raises(TorchMetricsUserError, match=r"the tokens of all processes; call unsync\(\) first") as refusal:
        REFUSED[call](metric)
    assert str(refusal.value).startswith(f"{call}: ")
    assert all(torch.equal(value, synced[key]) for key, value in metric.state_dict().items())
    metric.unsync()
    assert_as_before(metric, before)


def test_a_file_is_not_loaded_while_synced_nor_by_a_model(tmp_path):
    fed([sample(9)], hold=60).save(tmp_path / "state.safetensors")
    metric, gather = synced_metric()
    before = own_state(metric)
    model = torch.nn.ModuleDict({"metric": metric})
    metric.persistent(True)
    kept = model.state_dict()
    metric.sync(dist_sync_fn=gather)
    with pytest.raises(TorchMetricsUserError, match="unsync"):
        metric.load(tmp_path / "state.safetensors")
    with pytest.raises(TorchMetricsUserError, match="unsync"):
        model.load_state_dict(kept)
    metric.unsync()
    assert_as_before(metric, before)


def test_reset_while_synced_forgets_everything():
    metric, gather = synced_metric()
    metric.sync(dist_sync_fn=gather)
    metric.reset()
    assert_as_before(metric, own_state(ModalityIntegrationRate(hold=60)))
    metric.update(*sample(1))
    assert_counts_of_both(metric, [1])


def test_what_is_saved_while_synced_is_of_all_processes(tmp_path):
    metric, gather = synced_metric()
    before = own_state(metric)
    with metric.sync_context(dist_sync_fn=gather):
        state, further = metric.state_dict(), metric.second_pass()
        metric.save(tmp_path / "all.safetensors")
        twin = copy.deepcopy(metric)
    assert_as_before(metric, before)
    assert int(state["samples"]) == 2 * int(before["samples"])
    assert ModalityIntegrationRate.from_file(tmp_path / "all.safetensors").compute().kept == doubled().kept
    alone = ModalityIntegrationRate(hold=60)
    alone.load_state_dict(state)
    assert alone.compute().kept == doubled().kept
    twin.unsync()
    assert_as_before(twin, before)
    further.update(*sample(0))
    assert further._layers[0].tokens["text"].limits == alone._layers[0].final_limits["text"]


def test_synced_by_hand_compute_is_of_all_processes_once_and_then_of_its_own_again():
    metric, gather = synced_metric(sync_on_compute=False)
    own = metric.compute()
    for _ in range(2):
        metric.sync(dist_sync_fn=gather)
        assert metric.compute().kept == doubled().kept
        assert metric.compute() == own


@pytest.mark.parametrize(
    "refused",
    [
        lambda metric: metric.update(*text_only()[:2]),
        lambda metric: metric.update(sample(1)[0], *text_only()[1:], 3),
        lambda metric: metric.update([h[..., :4] for h in sample(1)[0]], *sample(1)[1:]),
    ],
    ids=["an argument is missing", "one too many", "other layers"],
)
def test_a_refused_update_leaves_count_and_result(refused):
    # A process that recomputes alone would wait for the others, which still have their result.
    metric, gather = synced_metric()
    result = metric.compute()
    count, gather.calls = metric.update_count, 0
    with pytest.raises((TypeError, ValueError)):
        refused(metric)
    assert metric.update_count == count
    assert metric.compute() == result
    assert gather.calls == 0


def test_processes_with_another_outlier_rule_are_refused():
    def other(tensor, group=None):
        theirs = tensor.clone()
        theirs[0, 1] = 1
        return [tensor, theirs]

    metric = fed([sample(0)], dist_sync_fn=other, distributed_available_fn=lambda: True)
    with pytest.raises(
        ValueError, match="outliers: expected the same setting on all processes, process 1 has a different one"
    ):
        metric.compute()


def test_announced_samples_are_told_of_its_own_process():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric, _ = synced_metric(groups=2, samples=10)
        notes = metric.compute().notes
    assert any(note.startswith("only 8 of 10 announced samples arrived") for note in notes)
