"""`mir compute` end to end on a tiny saved model: the value, resuming, refusals, several processes."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from integration.saved_models import save_tiny_llama, save_tiny_llava, write_images, write_texts
from modality_integration import compute, data, loading
from modality_integration.checkpoint import Passage
from modality_integration.compute import Interrupted, Options, run
from modality_integration.data import InputError
from modality_integration.metric import mir
from modality_integration.moca import add_moca, load_moca, remove_moca, save_moca
from modality_integration.residual_stream import capture
from modality_integration.result import MIRResult

SAMPLES = 12
# The command in a process of its own that dies, as by a power cut, once 7 samples are counted.
KILLED_AFTER_7 = """
import os, signal, sys
from modality_integration import cli, metric
update, counted = metric.ModalityIntegrationRate.update, 0
def dying(self, *args):
    global counted
    if counted == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    counted += 1
    return update(self, *args)
metric.ModalityIntegrationRate.update = dying
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("compute")
    save_tiny_llava(root / "model")
    write_images(root / "images", 7)
    write_texts(root / "text", 9)
    return root


@pytest.fixture
def options(folders, tmp_path):
    return Options(
        model=str(folders / "model"),
        images=folders / "images",
        text=folders / "text",
        samples=SAMPLES,
        out=tmp_path / "out",
        device="cpu",
        text_tokens=20,
        checkpoint_every=5,
    )


def quiet_run(options, **changes):
    return run(Options(**{**vars(options), **changes}), Console(quiet=True))


def command(options):
    """The arguments of `mir` for these options."""
    out = ["compute"]
    for name in ("model", "images", "text", "samples", "out", "device", "text_tokens", "checkpoint_every"):
        out += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return out


def in_process(options, *before):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *before, *command(options)], env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_value_is_mir_of_the_features_that_the_model_gives_sample_by_sample(options):
    result = quiet_run(options)

    model, processor, _ = loading.load(options.model, torch.device("cpu"))
    images = data.choose_images(options.images, SAMPLES, 0).items
    texts = data.choose_texts(options.text, SAMPLES, 0).items
    vision, text = [], []
    for sample in data.pair(images, texts, SAMPLES, 0):
        prose = data.truncate(sample.text.content, processor.tokenizer, options.text_tokens)
        inputs = processor(images=[data.open_image(sample.image)], text=[f"<image>\n{prose}"], return_tensors="pt")
        with torch.no_grad(), capture(model) as captured:
            model(**inputs)
        states = captured.hidden_states
        vision.append([h[captured.vision_mask] for h in states])
        text.append([h[captured.text_mask] for h in states])
    expected = mir([torch.cat(x) for x in zip(*vision, strict=True)], [torch.cat(x) for x in zip(*text, strict=True)])
    assert result.value == pytest.approx(expected.value, rel=1e-9)
    assert result.per_layer == pytest.approx(expected.per_layer, rel=1e-9)
    assert result.kept == expected.kept
    assert result.lower <= result.value <= result.upper


def test_it_writes_the_result_the_plot_and_what_was_run_and_leaves_no_checkpoint(options):
    result = quiet_run(options)
    assert MIRResult.from_json(options.out / "mir.json").value == result.value
    assert (options.out / "layers.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((options.out / "run.json").read_text())
    assert record["arguments"]["samples"] == SAMPLES
    assert record["mir"] == result.value
    assert not (options.out / "checkpoint").exists()


def test_it_prints_the_standard_error_beside_the_value_and_does_without_where_none_is_wanted(options, tmp_path):
    console = Console(record=True, file=io.StringIO())
    result = run(options, console)
    assert result.error > 0
    assert f"MIR {result.value:.4f} +- {result.error:.4f}" in console.export_text()
    assert json.loads((options.out / "run.json").read_text())["error"] == result.error
    plain = quiet_run(options, groups=0, out=tmp_path / "plain")
    assert plain.error is None
    assert plain.value == pytest.approx(result.value, rel=1e-9)


def test_an_error_of_fewer_groups_than_were_asked_for_is_in_the_notes(options):
    said = "the standard error is of 3 groups of samples, 5 were asked for: take more samples"
    assert said in quiet_run(options, samples=3).notes
    assert not any("asked for" in note for note in quiet_run(options, samples=5).notes)


def test_a_state_that_outgrows_the_memory_is_told_before_the_work(options, monkeypatch):
    d, layers, groups = 16, 3, 5
    accumulators = groups * 8 * layers * d * (d + 1)
    gathered = groups * 2 * layers * 1024 * d * 4
    held = 2 * layers * 2048 * d * 4
    for free, told in ((accumulators + gathered + held, True), (accumulators + gathered + held + 1, False)):
        monkeypatch.setattr(compute, "free_memory", lambda free=free: free)
        console = Console(record=True, file=io.StringIO(), width=200)
        run(Options(**{**vars(options), "samples": 2}), console)
        said = "may take 0.0 GB, and 0.0 GB are free on cpu: --groups 0 takes 0.0 GB"
        assert (said in console.export_text()) == told


def test_too_few_images_are_used_again_and_broken_ones_skipped_both_in_the_notes(options, tmp_path):
    write_images(tmp_path / "few", 3)
    (tmp_path / "few" / "broken.png").write_bytes(b"no picture")
    result = quiet_run(options, images=tmp_path / "few")
    assert "skipped 1 broken image" in result.notes
    assert f"3 usable images for {SAMPLES} samples: some are used more than once" in result.notes
    skipped = json.loads((options.out / "run.json").read_text())["skipped"]
    assert [entry["name"] for entry in skipped] == ["broken.png"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_value(options, tmp_path):
    first = quiet_run(options).to_json()
    assert quiet_run(options, out=tmp_path / "again").to_json() == first
    assert quiet_run(options, out=tmp_path / "other", seed=1).to_json() != first


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_with_the_same_bits(options, tmp_path):
    whole = quiet_run(options, out=tmp_path / "whole")
    killed = in_process(options, "-c", KILLED_AFTER_7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert json.loads((options.out / "checkpoint" / "rank0.json").read_text())["done"] == 5

    console = Console(record=True, file=io.StringIO())
    assert run(options, console).to_json() == whole.to_json()
    assert "going on after 5 of 12" in console.export_text()
    assert not (options.out / "checkpoint").exists()


def test_ctrl_c_finishes_the_sample_saves_and_resumes_to_the_same_bits(options, tmp_path, monkeypatch):
    whole = quiet_run(options, out=tmp_path / "whole")

    counted = 0
    update = compute.ModalityIntegrationRate.update

    def interrupted(self, *args):
        nonlocal counted
        counted += 1
        if counted == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *args)

    monkeypatch.setattr(compute.ModalityIntegrationRate, "update", interrupted)
    with pytest.raises(Interrupted, match="after 7 of 12 samples; the same command goes on") as stopped:
        quiet_run(options)
    assert stopped.value.code == 130
    monkeypatch.undo()
    assert json.loads((options.out / "checkpoint" / "rank0.json").read_text())["done"] == 7
    assert quiet_run(options).to_json() == whole.to_json()


@pytest.fixture
def unfinished(options, monkeypatch):
    """The options of a run that was interrupted and left its checkpoint."""
    update = compute.ModalityIntegrationRate.update

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *args)

    monkeypatch.setattr(compute.ModalityIntegrationRate, "update", interrupted)
    with pytest.raises(Interrupted):
        quiet_run(options)
    monkeypatch.undo()
    return options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 11}, r"samples was 12, now 11"),
        ({"seed": 3}, r"seed was 0, now 3"),
        ({"text_tokens": 9, "last": "raw"}, r"last was normed, now raw; text-tokens was 20, now 9"),
        ({"dtype": "float64"}, r"dtype was auto, now float64"),
    ],
)
def test_other_arguments_are_refused_by_name_while_a_run_is_unfinished(unfinished, change, message):
    with pytest.raises(InputError, match=message):
        quiet_run(unfinished, **change)


def test_other_data_under_the_same_name_are_refused(unfinished, tmp_path):
    write_images(tmp_path / "images", 7, seed=99)
    with pytest.raises(InputError, match="chosen-samples was"):
        quiet_run(unfinished, images=tmp_path / "images")


def test_restart_drops_the_checkpoint(unfinished):
    assert quiet_run(unfinished, seed=3, restart=True).value == pytest.approx(
        quiet_run(unfinished, seed=3, out=unfinished.out / "fresh").value
    )


def test_a_damaged_checkpoint_is_an_error_that_says_how_to_begin_anew(unfinished):
    (state,) = (unfinished.out / "checkpoint").glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match="--restart"):
        quiet_run(unfinished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./nowhere"}, "nowhere does not exist"),
        ({"images": "nowhere"}, "images: nowhere does not exist"),
        ({"text": "nowhere"}, "text: nowhere does not exist"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used here"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used here"),
        ({"samples": 1, "text_tokens": 1, "outliers": "none"}, "layer 1.*text"),
    ],
)
def test_what_cannot_work_is_refused_in_words(options, changes, message):
    with pytest.raises(InputError, match=message):
        quiet_run(options, **changes)


def test_a_model_without_eyes_is_refused_with_its_type(options, tmp_path):
    with pytest.raises(InputError, match="'llama', which takes no images"):
        quiet_run(options, model=str(save_tiny_llama(tmp_path / "llama")))


def test_a_model_saved_without_its_processor_is_refused_with_the_remedy(options, folders, tmp_path):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).write_bytes((folders / "model" / name).read_bytes())
    with pytest.raises(InputError, match=r"bare"):
        quiet_run(options, model=str(tmp_path / "bare"))


def changed_weights(folders, folder, change):
    """A copy of the model whose weights are `change(weights)`."""
    shutil.copytree(folders / "model", folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {k: v for k, v in weights.items() if "projector" not in k},
            r"lack 4 weights \(model.multi_modal_projector.linear_1.bias, .* and 1 more\); with random numbers",
        ),
        (
            lambda weights: {f"module.{k}": v for k, v in weights.items()},
            r"lack \d+ weights .*; they have \d+ weights \(module\..* instead: were they renamed",
        ),
        (
            lambda weights: {k: v[:, :-1].contiguous() if "linear_1.weight" in k else v for k, v in weights.items()},
            "weights in its files have other shapes than its config.json says",
        ),
    ],
)
def test_weights_that_are_missing_or_of_another_shape_are_refused_by_name(options, folders, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        quiet_run(options, model=changed_weights(folders, tmp_path / "changed", change))


def test_weights_that_the_model_has_no_place_for_are_in_the_notes(options, folders, tmp_path):
    model = changed_weights(folders, tmp_path / "more", lambda weights: weights | {"head.weight": torch.ones(3)})
    result = quiet_run(options, model=model)
    assert "the model has no place for 1 weight (head.weight) in its files, which are not used" in result.notes
    assert result.value == quiet_run(options, out=tmp_path / "plain").value


@pytest.mark.parametrize("beside", [False, True])
def test_moca_in_the_models_files_is_measured_with_it(options, tmp_path, beside):
    model, processor, _ = loading.load(options.model, torch.device("cpu"))
    add_moca(model, std=0.5)
    if beside:
        save_moca(model, tmp_path / "trained")
        remove_moca(model)
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    if beside:
        load_moca(model, tmp_path / "trained")
    samples, _, _ = compute.choose(options, Console(quiet=True))
    metric = compute.ModalityIntegrationRate(groups=5)
    compute.stream(model, processor, samples, metric, text_tokens=options.text_tokens)

    result = quiet_run(options, model=str(tmp_path / "trained"))
    assert result.value == pytest.approx(metric.compute().value, rel=1e-9)
    assert any("with the MoCa that" in note and "in 3 decoder layers" in note for note in result.notes)
    assert result.value != pytest.approx(quiet_run(options, out=tmp_path / "plain").value, rel=1e-3)


def test_a_broken_weight_file_is_one_line(options, folders, tmp_path):
    shutil.copytree(folders / "model", tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"model: .*half cannot be loaded: .*incomplete metadata"):
        quiet_run(options, model=str(tmp_path / "half"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but\nit was"), "needs torchvision: pip"),
        (ImportError("Package `num2words` is required to run SmolVLM processor."), "needs num2words: pip"),
        (ImportError("Using a `device_map` requires Accelerate: pip\nmore"), "device_map` requires Accelerate: pip$"),
        (RuntimeError("operator torchvision::nms does not exist"), "torchvision, which .* needs, does not load: pip"),
        (torch.OutOfMemoryError("CUDA"), "out of memory while loading .*--device-map auto"),
    ],
)
def test_a_package_that_is_missing_or_broken_is_one_line_that_says_what_to_install(options, monkeypatch, error, said):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", refuse)
    with pytest.raises(InputError, match=rf"\Amodel: [^\n]*{said}") as refused:
        quiet_run(options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 1}, "groups: takes 0"),
        ({"outliers": "median"}, "outliers: .median"),
        ({"precision": "most"}, "precision: takes"),
        ({"template": "chat"}, "no chat template"),
        ({"out": Path(__file__)}, "out: .*test_compute.py is a file"),
        ({"out": Path(__file__) / "deeper"}, "out: .*test_compute.py is a file"),
    ],
)
def test_what_cannot_work_is_refused_before_the_weights_are_read(options, monkeypatch, changes, message):
    def read(*args, **kwargs):
        pytest.fail("the weights were read")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", read)
    with pytest.raises(InputError, match=message):
        quiet_run(options, **changes)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_what_to_lower(options, monkeypatch, error):
    def exhausted(*args, **kwargs):
        raise error

    monkeypatch.setattr(compute.ModalityIntegrationRate, "update", exhausted)
    with pytest.raises(
        InputError, match=r"out of memory on cpu at sample 1 of 12 .*lower --text-tokens \(now 20\) or --groups"
    ):
        quiet_run(options)


def test_a_second_pass_runs_where_the_first_missed_outliers_and_its_result_has_none_missed(options, monkeypatch):
    made = compute.ModalityIntegrationRate

    def small_hold(**kwargs):
        return made(**kwargs, hold=17)

    monkeypatch.setattr(compute, "ModalityIntegrationRate", small_hold)
    changes = {"samples": 40, "images": options.images, "text": options.text}
    first = quiet_run(options, **changes)
    second = quiet_run(options, **changes, second_pass=True, out=options.out / "second")
    monkeypatch.undo()
    in_memory = quiet_run(options, **changes, out=options.out / "memory")
    assert first.total_missed, "the stand-in no longer misses an outlier: choose one that does"
    assert second.total_missed == 0
    assert second.value == pytest.approx(in_memory.value, rel=1e-6)
    assert second.kept == in_memory.kept


def test_two_processes_give_what_one_does(options, tmp_path):
    one = quiet_run(options, out=tmp_path / "alone")
    both = in_process(
        options, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "modality_integration"
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("wrote mir.json") == 1
    two = MIRResult.from_json(options.out / "mir.json")
    assert two.value == pytest.approx(one.value, rel=1e-9)
    assert two.per_layer == pytest.approx(one.per_layer, rel=1e-9)
    assert two.kept == one.kept
    assert not (options.out / "checkpoint").exists()


@pytest.mark.parametrize(
    ("wanted", "gpus", "device", "backend"),
    [
        ("auto", 4, "cuda:3", "cpu:gloo,cuda:nccl"),
        ("cuda", 2, "cuda:1", "cpu:gloo,cuda:nccl"),
        ("cpu", 4, "cpu", "gloo"),
        ("auto", 0, "cpu", "gloo"),
    ],
)
def test_a_process_takes_its_own_gpu_before_it_joins_and_objects_travel_over_gloo(
    monkeypatch, wanted, gpus, device, backend
):
    done = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(compute.dist, "init_process_group", done.append)
    monkeypatch.setattr(compute.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(compute.dist, "destroy_process_group", lambda: done.append("left"))
    picked = loading.pick_device(wanted)
    assert str(picked) == device
    with compute._processes(picked) as place:
        assert place == (3, 4)
    assert done == [*([device] if device != "cpu" else []), backend, "left"]


def test_checkpoints_by_the_clock_take_a_twentieth_of_the_time_at_most():
    now = [0.0]
    due = compute._Due(None, clock=lambda: now[0])
    assert not due(10)
    now[0] = compute.FIRST_CHECKPOINT
    assert due(11)
    with due.writing():
        now[0] += 50.0
    ended = now[0]
    now[0] = ended + 999.0
    assert not due(20)
    now[0] = ended + 1000.0
    assert due(21)
    with due.writing():
        now[0] += 0.001
    assert not due(22)
    now[0] += compute.FIRST_CHECKPOINT
    assert due(23)
    assert [count for count in range(1, 12) if compute._Due(5)(count)] == [5, 10]


def test_the_result_says_what_it_was_measured_with(options, folders):
    result = quiet_run(options, seed=3, precision="exact", last="raw")
    settings = MIRResult.from_json(options.out / "mir.json").settings
    assert settings == result.settings
    expected = {"model": str(folders / "model"), "samples": SAMPLES, "seed": 3, "in_order": False, "text_tokens": 20}
    expected |= {"template": "auto", "last": "raw", "text_role": "after", "precision": "exact", "dtype": "float32"}
    expected |= {"groups": 5, "processes": 1}
    assert settings | expected == settings
    assert settings["chosen_samples"] != quiet_run(options, seed=4).settings["chosen_samples"]


def test_precision_reaches_the_metric(options, monkeypatch):
    made, seen = compute.ModalityIntegrationRate, []
    monkeypatch.setattr(compute, "ModalityIntegrationRate", lambda **kwargs: (seen.append(kwargs), made(**kwargs))[1])
    quiet_run(options, precision="exact", samples=2)
    assert seen[0]["precision"] == "exact"


def test_a_device_map_spreads_the_model_and_gives_the_same_bits(options, tmp_path):
    pytest.importorskip("accelerate")
    spread = quiet_run(options, device_map="auto", samples=4)
    assert spread.per_layer == quiet_run(options, samples=4, out=tmp_path / "one").per_layer


@pytest.mark.parametrize(("other", "expected"), [(Passage(2, 3), Passage(2, 5)), (Passage(1, 9), Passage())])
def test_processes_that_were_killed_in_different_passes_begin_anew_together(monkeypatch, other, expected):
    def gather(passages, own):
        passages[:] = [own, other]

    monkeypatch.setattr(compute.dist, "all_gather_object", gather)
    assert compute._agreed(Passage(2, 5), world=2) == expected
