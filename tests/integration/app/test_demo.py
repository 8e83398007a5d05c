"""`mir demo`: the same code path on a tiny language model, and once, slowly, on the real one."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from integration.saved_models import save_tiny_llama
from modality_integration import MIRResult
from modality_integration.app import demo
from modality_integration.app.cli import main
from modality_integration.app.demo import Pictures, build, measure, probe_samples, run, trainable, training_step
from modality_integration.app.errors import InputError, Interrupted
from modality_integration.app.loading import load
from modality_integration.app.options import DemoOptions
from modality_integration.models.moca import moca_parameters

pytest.importorskip("sklearn")
pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("demo") / "llama")


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory):
    """A whole small demo: (options, results, what was printed)."""
    root = tmp_path_factory.mktemp("finished")
    options = DemoOptions(out=root / "out", steps=6, samples=6, save=root / "saved", language_model=llama)
    console = Console(file=io.StringIO(), record=True, width=120)
    return options, run(options, console), console.export_text()


def test_it_measures_before_during_and_after_and_writes_every_number(finished):
    options, results, _ = finished
    history = json.loads((options.out / "history.json").read_text())
    assert history["steps"] == [0, 1, 2, 4, 6]
    assert history["mir"] == [result.value for result in results]
    assert history["per_layer"] == [result.per_layer for result in results]
    assert len(history["loss"]) == 6
    assert MIRResult.from_json(options.out / "mir.json").value == results[-1].value
    assert MIRResult.from_json(options.out / "before.json").value == results[0].value


def test_it_prints_every_layer_of_every_probe_and_draws_both_plots(finished):
    options, results, printed = finished
    for step, result in zip([0, 1, 2, 4, 6], results, strict=True):
        assert f"step {step:>3}: MIR {result.value:.4f}" in printed
        for distance in result.per_layer:
            assert f"{distance:.4g}" in printed
    for name in ("layers.png", "training.png"):
        assert (options.out / name).read_bytes().startswith(b"\x89PNG")


def test_the_saved_model_and_probe_are_what_mir_compute_takes(finished, tmp_path):
    _, results, printed = finished
    command = next(line for line in printed.splitlines() if "mir compute" in line).split("mir compute ")[1]
    words = command.replace("mir-of-saved", str(tmp_path)).split()
    outcome = CliRunner().invoke(main, ["compute", *words, "--device", "cpu"])
    assert outcome.exit_code == 0, outcome.output
    again = MIRResult.from_json(tmp_path / "mir.json")
    # Same images, prose and weights; the pairs are drawn anew, which the vision tokens, being first, do not see.
    assert again.kept["vision"] == results[-1].kept["vision"]
    assert [t.trace_vision / a**2 for t, a in zip(again.terms, again.alpha, strict=True)] == pytest.approx(
        [t.trace_vision / a**2 for t, a in zip(results[-1].terms, results[-1].alpha, strict=True)], rel=1e-5
    )


def test_the_same_seed_gives_the_same_bits(finished, llama, tmp_path):
    _, results, _ = finished
    again = run(DemoOptions(out=tmp_path, steps=6, samples=6, language_model=llama), Console(quiet=True))
    assert [result.to_json() for result in again] == [result.to_json() for result in results]


def test_only_the_vision_side_is_trained_and_all_of_it_is(llama):
    model, processor = build(llama)
    decoder = {name: p.clone() for name, p in model.model.language_model.state_dict().items()}
    before = [p.clone() for p in trainable(model)]
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    training_step(model, processor, Pictures(0).batch(4), optimizer)
    for name, parameter in model.model.language_model.state_dict().items():
        assert torch.equal(parameter, decoder[name]), name
    vision = dict(model.model.vision_tower.named_parameters(prefix="tower"))
    vision |= dict(model.model.multi_modal_projector.named_parameters(prefix="projector"))
    still = [name for (name, p), old in zip(vision.items(), before, strict=True) if torch.equal(p, old)]
    # Biases of attention keys cancel in the softmax; the norm after the tower is for the class token alone.
    assert all("k_proj.bias" in name or "post_layernorm" in name for name in still), still


def test_the_loss_counts_caption_tokens_alone(llama):
    model, processor = build(llama)
    seen = {}

    class Loss(Exception):
        pass

    def forward(**inputs):
        seen.update(inputs)
        raise Loss

    model.forward = forward
    batch = Pictures(0).batch(4)
    with pytest.raises(Loss):
        training_step(model, processor, batch, torch.optim.SGD(trainable(model), lr=0.1))
    for ids, labels, item in zip(seen["input_ids"], seen["labels"], batch, strict=True):
        caption = processor.tokenizer(item.caption + processor.tokenizer.eos_token, add_special_tokens=False).input_ids
        assert labels[labels != -100].tolist() == caption
        assert ids[labels != -100].tolist() == caption


def test_the_probe_holds_digits_that_training_never_sees_and_is_the_same_for_a_seed():
    pictures = Pictures(0)
    trained = {item.image.tobytes() for item in pictures.digits}
    probe = [image.tobytes() for image in pictures.probe(20, 0)]
    pictures.batch(8)
    assert [image.tobytes() for image in pictures.probe(20, 0)] == probe
    assert len(trained & set(probe[:10])) <= 1  # one digit is drawn twice alike in the data set itself
    assert {item.caption for item in pictures.photographs} == set(demo.PHOTOGRAPHS.values())


def test_ctrl_c_keeps_what_was_measured(llama, tmp_path, monkeypatch):
    step, taken = demo.training_step, []

    def interrupted(*args):
        taken.append(0)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(demo, "training_step", interrupted)
    with pytest.raises(Interrupted, match=r"interrupted at step 3; what was measured is in .*history.json"):
        run(DemoOptions(out=tmp_path, steps=6, samples=4, language_model=llama), Console(quiet=True))
    assert json.loads((tmp_path / "history.json").read_text())["steps"] == [0, 1, 2]


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
    for parameter in moca_parameters(model):
        assert not torch.equal(parameter, parameter.round())  # neither ones nor zeros any more


def test_a_model_that_was_trained_with_moca_is_measured_with_it_after_saving(llama, tmp_path):
    options = DemoOptions(out=tmp_path, steps=2, samples=4, save=tmp_path / "saved", language_model=llama, moca=True)
    results = run(options, Console(quiet=True))
    loaded = load(str(options.save), torch.device("cpu"))
    assert loaded.notes == [f"with the MoCa that {options.save} holds, in 3 decoder layers"]
    probe = probe_samples(Pictures(0), 4, 0)
    again = measure(loaded.model, loaded.processor, probe, False, lambda count: None)
    assert again.value == pytest.approx(results[-1].value, rel=1e-6)


def test_the_worked_example_writes_loss_and_mir_of_both_trainings_and_their_plot(llama, tmp_path):
    script = Path(__file__).parents[3] / "benchmarks" / "moca_training.py"
    flags = ["--steps", "3", "--samples", "4", "--seeds", "0", "4", "--language-model", str(llama)]
    command = [sys.executable, str(script), *flags, "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    with (tmp_path / "moca_training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["run"], int(row["step"])) for row in rows] == [
        (seed, run, step) for seed in "04" for run in ("without MoCa", "with MoCa") for step in range(4)
    ]
    for row in rows:
        assert bool(row["loss"]) == (row["step"] != "0")
        assert row["mir"]  # of so few steps every one is measured
    values = [[row["mir"] for row in rows[start : start + 4]] for start in range(0, 16, 4)]
    assert values[0][0] == values[1][0]
    assert values[2][0] == values[3][0]
    assert len({mir for run in values for mir in run[1:]}) == 12
    assert (tmp_path / "moca_training.png").read_bytes().startswith(b"\x89PNG")


def test_a_language_model_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        run(DemoOptions(out=tmp_path, language_model=tmp_path / "nowhere"), Console(quiet=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        run(DemoOptions(out=tmp_path, language_model=tmp_path / "empty"), Console(quiet=True))


@pytest.mark.slow
def test_the_real_demo_learns_and_stays_within_its_memory(tmp_path):
    pytest.importorskip("gguf")
    import resource

    console = Console(file=io.StringIO(), record=True, width=120)
    results = run(DemoOptions(out=tmp_path), console)
    history = json.loads((tmp_path / "history.json").read_text())
    assert len(results) == 5
    assert len(results[0].per_layer) == 30
    assert sum(history["loss"][-10:]) < 0.5 * sum(history["loss"][:10])
    assert all(result.lower <= result.value <= result.upper for result in (results[0], results[-1]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6e6  # kB
