"""`mir compute --study`: every row equals MIR measured alone; the table reads back, and there is a picture."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from integration.saved_models import save_tiny_llava, write_images, write_texts
from modality_integration import ModalityIntegrationRate
from modality_integration.app import compute, loading, study
from modality_integration.app.cli import main
from modality_integration.app.errors import InputError
from modality_integration.app.options import ComputeOptions, TokenOptions
from modality_integration.app.samples import choose
from modality_integration.app.stream import stream

CHAT = (
    "{% for m in messages %}USER: {% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with a chat template, two kinds of images and two kinds of text."""
    root = tmp_path_factory.mktemp("study")
    save_tiny_llava(root / "model")
    for seed, kind in enumerate(("drawn", "photographed")):
        write_images(root / "images" / kind, 30, seed=seed)
    for seed, kind in enumerate(("mail", "news")):
        write_texts(root / "text" / kind, 30, seed=10 + seed)
    return root


@pytest.fixture
def options(folders, tmp_path):
    return ComputeOptions(
        model=str(folders / "model"), images=folders / "images", text=folders / "text", samples=24, text_tokens=20,
        device="cpu", out=tmp_path / "out", template="plain", bounds=False, overwrite=True,
    )  # fmt: skip


def studied(name, options, **changes):
    """The rows of a study, after checking that the table on disk agrees and the picture exists."""
    options = ComputeOptions(**{**vars(options), **changes})
    rows = study.run(name, options, Console(quiet=True))
    written = study.read(options.out / f"study_{name}.csv")
    assert [list(row) for row in written] == [list(row) for row in rows]
    for row, read in zip(rows, written, strict=True):
        for key, value in row.items():
            assert read[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    assert (options.out / f"study_{name}.png").read_bytes().startswith(b"\x89PNG")
    return rows


def value_of(options, **changes):
    return compute.run(ComputeOptions(**{**vars(options), "out": options.out / "one", **changes}), Console(quiet=True))


def test_sample_count_reads_the_value_of_the_first_samples_along_one_stream(options):
    rows = studied("samples", options, groups=4)
    assert [row["samples"] for row in rows] == [5, 10, 20, 24]
    model, processor, _ = loading.load(options.model, torch.device("cpu"))
    samples, _, _ = choose(options, Console(quiet=True))
    for row in rows:
        metric = ModalityIntegrationRate(groups=4)
        stream(model, processor, samples[: row["samples"]], metric, TokenOptions(text_tokens=20, template="plain"))
        result = metric.compute()
        assert row["mir"] == pytest.approx(result.value, rel=1e-12)
        assert row["error"] == pytest.approx(result.error, rel=1e-9)
        assert row["vision_tokens"] == 4 * row["samples"]
        assert row["text_tokens"] == result.kept["text"][0] + result.removed["text"][0]
        assert row["missed"] == 0


def test_normalization_has_both_distances_of_every_layer(options):
    rows = studied("normalization", options, normalize=False)  # requested or not, the study shows both
    on, off = value_of(options), value_of(options, normalize=False)
    assert [row["layer"] for row in rows] == [1, 2, 3]
    assert [row["normalized"] for row in rows] == pytest.approx(on.per_layer, rel=1e-9)
    assert [row["unnormalized"] for row in rows] == pytest.approx(off.per_layer, rel=1e-9)
    assert [row["alpha"] for row in rows] == pytest.approx(on.alpha, rel=1e-12)


def test_content_pairs_every_kind_of_image_with_every_kind_of_text(options):
    rows = studied("content", options, samples=12)
    assert [(row["images"], row["text"]) for row in rows] == [
        ("drawn", "mail"), ("drawn", "news"), ("photographed", "mail"), ("photographed", "news"),
    ]  # fmt: skip
    for row in rows:
        images, text = options.images / row["images"], options.text / row["text"]
        expected = value_of(options, images=images, text=text, samples=12)
        assert row["mir"] == pytest.approx(expected.value, rel=1e-12)
        assert row["error"] == pytest.approx(expected.error, rel=1e-9)
    assert len({row["mir"] for row in rows}) == 4


def test_content_of_one_kind_against_two_is_enough_and_of_one_against_one_is_refused(options):
    drawn, mail = options.images / "drawn", options.text / "mail"
    rows = studied("content", options, images=drawn, samples=6)
    assert [(row["images"], row["text"]) for row in rows] == [("drawn", "mail"), ("drawn", "news")]
    with pytest.raises(InputError, match="content compares kinds, each a sub-folder"):
        studied("content", options, images=drawn, text=mail)


def test_files_beside_the_kinds_are_not_used_and_the_study_says_so(options, tmp_path):
    shutil.copytree(options.images, tmp_path / "images")
    write_images(tmp_path / "images", 2)
    (tmp_path / "images" / ".hidden").write_bytes(b"")
    changes = {"images": tmp_path / "images", "text": options.text / "mail", "samples": 4}
    console = Console(record=True, file=io.StringIO(), width=300)
    rows = study.run("content", ComputeOptions(**{**vars(options), **changes}), console)
    assert {row["images"] for row in rows} == {"drawn", "photographed"}
    said = console.export_text()
    assert f"ignored 2 files next to the sub-folders of {tmp_path / 'images'}: only sub-folders are kinds" in said
    assert said.count("next to the sub-folders") == 1


def test_repeated_sample_counts_are_those_of_each_seed_and_their_plot_has_mean_and_range(options, tmp_path):
    rows = study.run("samples", ComputeOptions(**{**vars(options), "samples": 6}), Console(quiet=True), repeat=3)
    assert [(row["set"], row["samples"]) for row in rows] == [(s, n) for s in (1, 2, 3) for n in (5, 6)]
    for number in range(3):
        alone = studied("samples", options, samples=6, seed=number, out=tmp_path / str(number))
        assert [{"set": number + 1, **row} for row in alone] == rows[2 * number : 2 * number + 2]
    assert study.read(options.out / "study_samples.csv")[-1]["set"] == 3
    for name, changes in (("layers", {}), ("samples", {"protocol": "published"})):
        with pytest.raises(InputError, match="repeat: applies only to the random samples"):
            study.run(name, ComputeOptions(**{**vars(options), **changes}), Console(quiet=True), repeat=2)


def test_template_measures_the_same_samples_with_the_chat_template_and_plain(options, folders, tmp_path):
    with pytest.raises(InputError, match="no chat template"):
        studied("template", options)
    shutil.copytree(folders / "model", tmp_path / "chatty")
    (tmp_path / "chatty" / "chat_template.jinja").write_text(CHAT)
    options = ComputeOptions(**{**vars(options), "model": str(tmp_path / "chatty")})
    rows = studied("template", options)
    for row, name in zip(rows, ("chat", "plain"), strict=True):
        assert row["template"] == name
        assert row["mir"] == pytest.approx(value_of(options, template=name).value, rel=1e-12)
    assert rows[0]["mir"] != rows[1]["mir"]


def test_layers_has_the_terms_of_every_layer(options):
    rows = studied("layers", options)
    expected = value_of(options)
    assert [row["distance"] for row in rows] == pytest.approx(expected.per_layer, rel=1e-12)
    assert [row["error"] for row in rows] == pytest.approx(expected.layer_errors, rel=1e-9)
    for row, terms in zip(rows, expected.terms, strict=True):
        assert row["mean"] == pytest.approx(terms.mean, rel=1e-12)
        assert row["trace_root"] == pytest.approx(terms.trace_root, rel=1e-12)


@pytest.mark.parametrize("name", ["samples", "layers"])
def test_without_groups_a_study_has_no_errors(options, name):
    assert {row["error"] for row in studied(name, options, samples=6, groups=0)} == {None}


def test_options_reach_the_study(options):
    values = set()
    for change in ({}, {"outliers": "none"}, {"normalize": False}, {"last": "raw"}, {"text_role": "all"}, {"seed": 5}):
        (row,) = studied("samples", options, samples=5, **change)
        assert row["mir"] == pytest.approx(value_of(options, samples=5, **change).value, rel=1e-12)
        values.add(row["mir"])
    assert len(values) >= 4  # the tiny model has no outliers, and its plain template no text before the image


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_pass": True}, "does not accept --second-pass"),
        ({"restart": True}, "does not accept --restart"),
        ({"images": Path("nowhere")}, "nowhere does not exist"),
        ({"groups": 1}, "groups: expected 0"),
        ({"out": Path(__file__)}, "out: expected a folder, got the file .*test_study.py"),
    ],
)
def test_what_a_study_cannot_do_is_refused(options, changes, message):
    for name in ("samples", "content"):
        with pytest.raises(InputError, match=message):
            studied(name, options, **changes)


def test_options_that_cannot_be_are_refused_before_the_weights_are_read(options, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", lambda *a, **k: pytest.fail("read"))
    for changes in ({"groups": 1}, {"precision": "most"}, {"template": "chat"}):
        with pytest.raises(InputError, match=next(iter(changes))):
            studied("samples", options, **changes)


def test_several_processes_are_refused(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process"):
        studied("samples", options)


def test_rows_that_are_finished_stay_in_the_table_when_a_study_stops(tmp_path):
    def stopped():
        yield {"layer": 1, "alpha": 0.5}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.write("normalization", stopped(), tmp_path, {"commit": "abc"})
    assert study.read(tmp_path / "study_normalization.csv") == [{"layer": 1, "alpha": 0.5, "commit": "abc"}]


def test_the_command_prints_the_table_and_names_the_files(options):
    words = ["compute", "--study", "samples", "--template", "plain", "--text-tokens", "20", "--samples", "6"]
    for name in ("model", "images", "text", "out"):
        words += [f"--{name}", str(getattr(options, name))]
    outcome = CliRunner().invoke(main, [*words, "--device", "cpu"], env={"COLUMNS": "120"})
    assert outcome.exit_code == 0, outcome.output
    for row in study.read(options.out / "study_samples.csv"):
        assert f"{row['mir']:.4f}" in outcome.output
    assert "wrote study_samples.csv and study_samples.png" in outcome.output
    assert CliRunner().invoke(main, [*words[:2], "numbers", *words[3:]]).exit_code == 2
