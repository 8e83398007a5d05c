"""`mir demo`: the same code path with a tiny language model, and in one slow test with the real one."""

import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from integration.demo_packages import needs
from integration.full_disk import full_disk
from modality_integration import MIRResult
from modality_integration.app import demo
from modality_integration.app.cli import main
from modality_integration.app.demo import Pictures, build, measure, probe_samples, run, training
from modality_integration.app.errors import InputError, Interrupted
from modality_integration.app.loading import load
from modality_integration.app.options import DemoOptions
from modality_integration.app.results import NotWritten
from modality_integration.app.settings import versions
from modality_integration.metric.standard_error import arithmetic
from modality_integration.models.moca import NAME as MOCA

pytestmark = needs()


@pytest.fixture(scope="module", autouse=True)
def few_held_out():
    """The encoder is the real one even here, so it gets fewer pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "HELD_OUT", 4)
        yield


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory):
    """A complete small demo: (options, results, printed text)."""
    root = tmp_path_factory.mktemp("finished")
    options = DemoOptions(out=root / "out", steps=6, samples=6, save=root / "saved", language_model=llama)
    console = Console(file=io.StringIO(), record=True, width=120)
    return options, run(options, console), console.export_text()


def test_it_measures_before_during_and_after_and_writes_every_number(finished):
    options, results, _ = finished
    history = json.loads((options.out / "history.json").read_text())
    assert history["steps"] == [0, 1, 3, 6]
    assert history["mir"] == [result.value for result in results]
    assert history["error"] == [result.error for result in results]
    assert all(error > 0 for error in history["error"])
    assert history["per_layer"] == [result.per_layer for result in results]
    assert len(history["loss"]) == 6
    assert len(history["held_out_loss"]) == 4
    assert len(set(history["held_out_loss"])) == 4
    assert MIRResult.from_json(options.out / "mir.json").value == results[-1].value
    assert MIRResult.from_json(options.out / "before.json").value == results[0].value


def test_it_prints_every_layer_of_every_probe_and_draws_both_plots(finished):
    options, results, printed = finished
    for step, result in zip([0, 1, 3, 6], results, strict=True):
        assert f"step {step:>3}: MIR {result.value:.4f} +- " in printed
        for distance in result.per_layer:
            assert f"{distance:.4g}" in printed
    for name in ("layers.png", "training.png"):
        assert (options.out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("steps", "probes"), [(1, [0, 1]), (6, [0, 1, 3, 6]), (80, [0, 10, 20, 40, 80])], ids=str)
def test_mir_is_measured_before_after_and_at_halves_of_the_training(steps, probes):
    assert demo.probe_steps(steps) == probes


def test_the_saved_model_and_probe_are_what_mir_compute_takes(finished, tmp_path):
    _, results, printed = finished
    command = next(line for line in printed.splitlines() if "mir compute" in line).split("mir compute ")[1]
    words = command.replace("mir-of-saved", str(tmp_path)).split()
    outcome = CliRunner().invoke(main, ["compute", *words, "--device", "cpu"])
    assert outcome.exit_code == 0, outcome.output
    again = MIRResult.from_json(tmp_path / "mir.json")
    # Same images, prose and weights, but new pairs. Vision tokens come before the prose and do not see it.
    assert again.kept["vision"] == results[-1].kept["vision"]
    assert [t.trace_vision / a**2 for t, a in zip(again.terms, again.alpha, strict=True)] == pytest.approx(
        [t.trace_vision / a**2 for t, a in zip(results[-1].terms, results[-1].alpha, strict=True)], rel=1e-5
    )


def test_asked_for_bounds_every_line_has_an_interval(finished, llama, tmp_path):
    console = Console(file=io.StringIO(), record=True, width=120)
    results = run(DemoOptions(out=tmp_path, steps=1, samples=6, language_model=llama, bounds=True), console)
    assert results[0].value == finished[1][0].value
    printed = console.export_text()
    for result in results:
        assert result.lower <= result.value <= result.upper
        assert arithmetic(result) in printed


def test_the_same_seed_gives_the_same_bits(finished, llama, tmp_path):
    _, results, _ = finished
    again = run(DemoOptions(out=tmp_path, steps=6, samples=6, language_model=llama), Console(quiet=True))
    assert [result.to_json() for result in again] == [result.to_json() for result in results]


def test_ctrl_c_keeps_what_was_measured(llama, tmp_path, monkeypatch):
    step, taken = training.training_step, []

    def interrupted(*args):
        taken.append(0)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(training, "training_step", interrupted)
    with pytest.raises(Interrupted, match=r"interrupted at step 3; measurements so far are in .*history.json"):
        run(DemoOptions(out=tmp_path, steps=6, samples=4, language_model=llama), Console(quiet=True))
    assert json.loads((tmp_path / "history.json").read_text())["steps"] == [0, 1, 3]


def test_ctrl_c_before_the_first_measurement_promises_no_file(llama, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "measure", interrupted)
    with pytest.raises(Interrupted, match="interrupted at step 0; nothing was written"):
        run(DemoOptions(out=tmp_path / "out", steps=6, samples=4, language_model=llama), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_costs_no_number_that_was_measured(llama, tmp_path):
    console = Console(file=io.StringIO(), record=True, width=300)
    options = DemoOptions(out=tmp_path, steps=1, samples=4, language_model=llama)
    with full_disk(), pytest.raises(NotWritten, match=r"the results could not be written: .*mir\.json: ") as refused:
        run(options, console)
    printed = console.export_text()
    for step, result in enumerate(refused.value.result):
        assert f"step   {step}: MIR {result.value:.4f}" in printed
        assert f"note step {step} could not be written: {tmp_path / 'mir.json'}: File too large" in printed
        assert f"{result.per_layer[0]:.4g}" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_results_say_with_which_versions_they_were_measured(finished):
    options, _, _ = finished
    known = MIRResult.from_json(options.out / "mir.json").settings
    assert known["processor"] == "LlavaProcessor"
    assert known | versions() == known


def test_moca_starts_as_the_model_without_it_and_is_trained(finished, llama, tmp_path, monkeypatch):
    options, results, _ = finished
    models = []
    monkeypatch.setattr(demo, "build", lambda folder: models.append(build(folder)) or models[-1])
    with_moca = run(DemoOptions(out=tmp_path, steps=6, samples=6, language_model=llama, moca=True), Console(quiet=True))
    assert with_moca[0].value == results[0].value
    losses = [json.loads((out / "history.json").read_text())["loss"] for out in (options.out, tmp_path)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert with_moca[-1].value != results[-1].value
    ((model, _),) = models
    still = [name for name, p in model.named_parameters() if MOCA in name and torch.equal(p, p.round())]
    # The last layer's vision tokens do not affect any caption; in the other layers MoCa has moved from ones and zeros.
    assert len(still) == 2
    assert all(".layers.2." in name for name in still)


def test_a_model_that_was_trained_with_moca_is_measured_with_it_after_saving(llama, tmp_path):
    options = DemoOptions(out=tmp_path, steps=2, samples=4, save=tmp_path / "saved", language_model=llama, moca=True)
    results = run(options, Console(quiet=True))
    loaded = load(str(options.save), torch.device("cpu"))
    assert loaded.notes == [f"using MoCa from {options.save} in 3 decoder layers"]
    again = measure(loaded.model, loaded.processor, probe_samples(Pictures(0), 4, 0))
    assert again.value == pytest.approx(results[-1].value, rel=1e-6)


def test_a_language_model_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="language-model: expected a folder, got"):
        run(DemoOptions(out=tmp_path, language_model=tmp_path / "nowhere"), Console(quiet=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        run(DemoOptions(out=tmp_path, language_model=tmp_path / "empty"), Console(quiet=True))


@pytest.mark.slow
def test_the_real_demo_learns_and_stays_within_its_memory(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    import resource

    monkeypatch.setattr(demo, "HELD_OUT", 16)
    console = Console(file=io.StringIO(), record=True, width=120)
    results = run(DemoOptions(out=tmp_path), console)
    history = json.loads((tmp_path / "history.json").read_text())
    assert len(results) == 5
    assert len(results[0].per_layer) == 30
    assert sum(history["loss"][-10:]) < 0.5 * sum(history["loss"][:10])
    assert history["held_out_loss"][-1] < 0.5 * history["held_out_loss"][0]
    assert all(0 < result.error < 0.1 for result in results)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6e6  # kB
