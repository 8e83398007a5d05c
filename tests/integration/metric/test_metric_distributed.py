"""ModalityIntegrationRate over two processes (gloo): every process gets the value of one process with all samples."""

import json
import multiprocessing
import traceback

import pytest
import torch
from torch import distributed

from integration.metric.streams import D, sample
from integration.metric.test_sinks import sample as sink_sample
from modality_integration import ModalityIntegrationRate
from modality_integration.metric import streaming
from modality_integration.metric.sync import transport_device

SAMPLES = 12


def _one(rank, scenario, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        answer = SCENARIOS[scenario](rank)
    except Exception:
        answer = {"error": traceback.format_exc()}
    (folder / f"rank{rank}.json").write_text(json.dumps(answer))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture
def two_processes(tmp_path):
    def run(scenario):
        context = multiprocessing.get_context("fork")  # torch is already loaded, and no threads have been used yet
        children = [context.Process(target=_one, args=(rank, scenario, tmp_path)) for rank in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
            assert child.exitcode == 0
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    return run


def fed(seeds, **options):
    metric = ModalityIntegrationRate(**{"precision": "exact", "hold": 60, **options})
    for seed in seeds:
        metric.update(*sample(seed, dtype=torch.bfloat16))
    return metric


def answer_of(metric):
    return json.loads(metric.compute().to_json())


def halves(rank, **options):
    metric = fed(range(rank, SAMPLES, 2), **options)
    first = answer_of(metric)
    metric.update(*sample(100 + rank, dtype=torch.bfloat16))  # continues with its own tokens after a synced compute
    return {"first": first, "second": answer_of(metric)}


def odd_groups(rank):
    return {"error": refusal(fed([rank], groups=5 if rank else 0))}


def one_side_empty(rank):
    return {"first": answer_of(fed(range(SAMPLES) if rank == 1 else []))}


def one_side_unreleased(rank):
    return {"first": answer_of(fed(range(SAMPLES - 1) if rank == 0 else [SAMPLES - 1], hold=200))}


def by_hand(rank):
    metric = fed(range(rank, SAMPLES, 2), sync_on_compute=False)
    before = answer_of(metric)
    metric.compute_with_cache, metric._computed = False, None
    metric.sync()
    synced = answer_of(metric)  # torchmetrics unsyncs after one compute
    return {"first": synced, "before": before, "after": answer_of(metric)}


def nobody(rank):
    return {"error": refusal(fed([]))}


def mismatch(rank):
    metric = ModalityIntegrationRate()
    hidden, vision, text = sample(rank)
    metric.update(hidden if rank == 0 else [h[..., : D - 4] for h in hidden], vision, text)
    return {"error": refusal(metric)}


def with_sinks(rank, *, on=(0, 1), only=(0, 1), **options):
    """Samples rank, rank + 2, ... on the processes in `only`, with sinks on those in `on`."""
    metric = ModalityIntegrationRate(precision="exact", outliers="none", **options)
    for seed in range(rank, SAMPLES, 2) if rank in only else []:
        metric.update(*sink_sample(seed, sink=rank in on, dtype=torch.bfloat16))
    return {"first": answer_of(metric)}


def odd_sinks(rank):
    return {"error": refusal(ModalityIntegrationRate() if rank else fed([rank], sinks="leave out"))}


def after_failures(rank):
    """A compute that fails on both processes, one that fails on process 1 alone, an update while synced; then normal
    use.
    """
    hidden, vision, text = sample(200 + rank, dtype=torch.bfloat16)
    metric = ModalityIntegrationRate(precision="exact", hold=60)
    metric.update(hidden, torch.zeros_like(vision), text)
    errors = [refusal(metric)]
    for seed in range(rank, SAMPLES, 2):
        metric.update(*sample(seed, dtype=torch.bfloat16))
    if rank == 1:
        computing, streaming.mir_result = streaming.mir_result, raising
    errors.append(refusal(metric))
    if rank == 1:
        streaming.mir_result = computing
    first = answer_of(metric)
    metric.sync()
    errors.append(refusal(metric, lambda: metric.update(*sample(0))))
    metric.unsync()
    metric.update(*sample(100 + rank, dtype=torch.bfloat16))
    return {"errors": errors, "first": first, "second": answer_of(metric)}


def raising(*args):
    raise MemoryError("no more")


def refusal(metric, call=None):
    try:
        (call or metric.compute)()
    except Exception as error:
        return str(error)
    return "was not refused"


SCENARIOS = {
    "halves": halves,
    "everything held": lambda rank: halves(rank, hold=5000),
    "default precision": lambda rank: halves(rank, precision="auto"),
    "groups": lambda rank: halves(rank, groups=4),
    "groups, everything held": lambda rank: halves(rank, groups=4, hold=5000),
    "groups one after the other": lambda rank: halves(rank, groups=4, samples=28),
    "groups that differ": odd_groups,
    "one side empty": one_side_empty,
    "one side unreleased": one_side_unreleased,
    "by hand": by_hand,
    "nobody": nobody,
    "mismatch": mismatch,
    "sinks on both": with_sinks,
    "sinks on both, left out": lambda rank: with_sinks(rank, sinks="leave out"),
    "sinks on one": lambda rank: with_sinks(rank, on=(1,)),
    "sinks on one, nothing on the other": lambda rank: with_sinks(rank, only=(1,)),
    "sinks on both, little held": lambda rank: with_sinks(rank, hold=2),
    "sinks that differ": odd_sinks,
    "after failures": after_failures,
}


def assert_same(answers, key, expected, tolerance=1e-9):
    assert answers[0][key] == answers[1][key]  # bit-identical on both
    for got, want in zip(answers[0][key]["layers"], expected["layers"], strict=True):
        assert got["distance"] == pytest.approx(want["distance"], rel=tolerance)
        assert got["kept"] == want["kept"]
        assert got["removed"] == want["removed"]
    assert answers[0][key]["mir"] == pytest.approx(expected["mir"], abs=tolerance)


@pytest.mark.parametrize(
    ("scenario", "options", "tolerance"),
    [
        ("halves", {}, 1e-9),
        ("everything held", {"hold": 5000}, 1e-9),
        ("default precision", {"precision": "auto"}, 1e-4),
    ],
)
def test_two_processes_with_half_the_samples_each_are_one_with_all(two_processes, scenario, options, tolerance):
    answers = two_processes(scenario)
    assert_same(answers, "first", answer_of(fed(range(SAMPLES), **options)), tolerance)
    assert_same(answers, "second", answer_of(fed([*range(SAMPLES), 100, 101], **options)), tolerance)


@pytest.mark.parametrize(
    ("scenario", "hold", "group_of"),
    [
        ("groups", 60, lambda rank, row: (rank + row) % 4),
        ("groups, everything held", 5000, lambda rank, row: (rank + row) % 4),
        ("groups one after the other", 60, lambda rank, row: (2 * row + rank) * 4 // 28),
    ],
)
def test_the_standard_error_is_that_of_the_groups_of_all_processes(two_processes, scenario, hold, group_of):
    answers = two_processes(scenario)
    assert answers[0]["first"] == answers[1]["first"]
    # Process r has the samples r, r + 2, ... of two rows each.
    left_out = []
    for group in range(4):
        metric = ModalityIntegrationRate(precision="exact", hold=hold)
        for rank in range(2):
            for index, seed in enumerate(range(rank, SAMPLES, 2)):
                hidden, vision, text = sample(seed, dtype=torch.bfloat16)
                rows = torch.tensor([group_of(rank, 2 * index + row) != group for row in range(2)])
                metric.update([h[rows] for h in hidden], vision[rows], text[rows])
        left_out.append(answer_of(metric)["layers"])
    for k, layer in enumerate(answers[0]["first"]["layers"]):
        assert layer["left_out"] == pytest.approx([layers[k]["distance"] for layers in left_out], rel=1e-9)
    assert answers[0]["first"]["error"] > 0


def test_processes_with_other_numbers_of_groups_are_refused(two_processes):
    for answer in two_processes("groups that differ"):
        assert "groups: expected the same number on all processes" in answer["error"]


@pytest.mark.parametrize("scenario", ["one side empty", "one side unreleased"])
def test_processes_with_little_or_nothing_are_fine(two_processes, scenario):
    options = {"hold": 200} if scenario == "one side unreleased" else {}
    assert_same(two_processes(scenario), "first", answer_of(fed(range(SAMPLES), **options)))


def test_sync_by_hand_shows_all_tokens_and_then_its_own(two_processes):
    answers = two_processes("by hand")
    assert_same(answers, "first", answer_of(fed(range(SAMPLES))))
    for answer in answers:
        assert answer["after"] == answer["before"]
    assert answers[0]["after"] != answers[1]["after"]


def test_after_failures_on_both_and_on_one_every_process_goes_on_with_its_own_tokens(two_processes):
    answers = two_processes("after failures")
    for answer, failed in zip(answers, ("compute: failed on process 1", "no more"), strict=True):
        assert "no token of vision" in answer["errors"][0]
        assert failed in answer["errors"][1]
        assert "call unsync() first" in answer["errors"][2]
    expected = ModalityIntegrationRate(precision="exact", hold=60)
    for rank in range(2):
        hidden, vision, text = sample(200 + rank, dtype=torch.bfloat16)
        expected.update(hidden, torch.zeros_like(vision), text)
    for seed in range(SAMPLES):
        expected.update(*sample(seed, dtype=torch.bfloat16))
    assert_same(answers, "first", answer_of(expected))
    for seed in (100, 101):
        expected.update(*sample(seed, dtype=torch.bfloat16))
    assert_same(answers, "second", answer_of(expected))


def test_no_tokens_anywhere_is_said_on_every_process(two_processes):
    assert [a["error"] for a in two_processes("nobody")] == [
        "no hidden states yet: MIR requires at least one update"
    ] * 2


def test_layers_that_do_not_match_are_refused_on_every_process(two_processes):
    for answer in two_processes("mismatch"):
        assert "processes 0 and 1 have different layers" in answer["error"]
        assert "(24, 'float32')" in answer["error"]
        assert "(20, 'float32')" in answer["error"]


@pytest.mark.parametrize(
    ("scenario", "on", "only", "options"),
    [
        ("sinks on both", (0, 1), (0, 1), {}),
        ("sinks on both, left out", (0, 1), (0, 1), {"sinks": "leave out"}),
        ("sinks on one", (1,), (0, 1), {}),
        ("sinks on one, nothing on the other", (1,), (1,), {}),
        ("sinks on both, little held", (0, 1), (0, 1), {"hold": 2}),
    ],
)
def test_sinks_are_those_of_all_processes(two_processes, scenario, on, only, options):
    answers = two_processes(scenario)
    metric = ModalityIntegrationRate(precision="exact", outliers="none", **options)
    for seed in range(SAMPLES):
        if seed % 2 in only:
            metric.update(*sink_sample(seed, sink=seed % 2 in on, dtype=torch.bfloat16))
    expected = answer_of(metric)
    assert_same(answers, "first", expected)
    assert answers[0]["first"]["sink_positions"] == expected["sink_positions"]
    for got, want in zip(answers[0]["first"]["layers"], expected["layers"], strict=True):
        assert got["massive"] == want["massive"]
        if want["without_sinks"] is not None:
            assert got["without_sinks"] == pytest.approx(want["without_sinks"], rel=1e-9)


def test_processes_that_handle_sinks_otherwise_are_refused(two_processes):
    for answer in two_processes("sinks that differ"):
        assert "sinks: expected the same setting on all processes, process 1 has a different one" in answer["error"]


@pytest.mark.parametrize(
    ("backends", "device"),
    [("cpu:gloo,cuda:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda:3")],
)
def test_tensors_travel_where_the_group_has_a_backend(backends, device, monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert transport_device(None) == torch.device(device)
