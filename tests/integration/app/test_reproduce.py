"""`make reproduce`, everything once and tiny: tables and figures of every claim, and no work done twice."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console

import harness
import reproduce
import reproduce_tables
from integration.demo_packages import needs
from modality_integration.app import study
from modality_integration.models.moca import NAME as MOCA
from reproduce_units import TINY, Scale, Training, Workshop

pytestmark = needs()

TRAINED = ["step", "mir", "error", "mir_without_sinks", "held_out_loss"]
COLUMNS = {
    "training": ["seed", *TRAINED],
    "data": ["images", "seed", *TRAINED],
    "projector": ["projector", "seed", *TRAINED],
    "moca": ["moca", "seed", *TRAINED],
    "samples": ["samples", "vision_tokens", "text_tokens", "mir", "error", "missed"],
    "normalization": ["layer", "alpha", "normalized", "unnormalized", "missed"],
    "content": ["images", "text", "template", "mir", "error", "mir_without_sinks"],
}


def reproduced(llama, out, work, *words):
    with pytest.MonkeyPatch.context() as patch:
        folders = ["--out", str(out), "--work", str(work), "--language-model", str(llama)]
        patch.setattr(sys, "argv", ["reproduce.py", "--tiny", *folders, *words])
        reproduce.main()


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory):
    """A whole tiny run: folders of its tables, and of its units of work."""
    root = tmp_path_factory.mktemp("finished")
    reproduced(llama, root / "out", root / "work")
    return root / "out", root / "work"


@pytest.fixture
def shop(llama, tmp_path):
    return Workshop(tmp_path / "work", TINY, llama, Console(quiet=True))


def table(finished, name):
    return study.read(finished[0] / f"reproduce_{name}.csv")


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_every_experiment_has_a_table_that_says_where_it_ran_a_page_s_table_and_a_figure(finished, name):
    rows = table(finished, name)
    assert all(row["torch"] and row["commit"] for row in rows)
    if "mir" in rows[0]:
        assert all(row["mir"] > 0 and row["error"] > 0 for row in rows)
    lines = reproduce_tables.lines(name, rows)
    columns = lines[0].count("|")
    assert all(line.count("|") in (0, columns) for line in lines)
    with Image.open(finished[0] / f"reproduce_{name}.png") as figure:
        assert len(figure.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_every_table_has_its_columns_and_finite_numbers(finished, name):
    rows = table(finished, name)
    assert list(rows[0]) == [*COLUMNS[name], *harness.environment_columns()]
    for row in rows:
        numbers = {column: row[column] for column in COLUMNS[name] if not isinstance(row[column], str)}
        # Without attention sinks there is no second value; every other cell has to be filled.
        assert all(value is not None for column, value in numbers.items() if column != "mir_without_sinks")
        assert all(math.isfinite(value) for value in numbers.values() if value is not None)


def test_the_pages_tables_are_those_of_the_experiments():
    assert set(reproduce_tables.EXPERIMENTS) == set(reproduce.EXPERIMENTS)


def test_trainings_are_shared_between_experiments(finished):
    trainings = {file.stem for file in finished[1].glob("train-*.json")}
    compared = {f"train-4-seed{seed}-{name}" for seed in (0, 1) for name in ("linear", "mlp2", "mlp4")}
    assert trainings == compared | {"train-8-seed0-mlp2", "train-8-seed1-mlp2", "train-4-seed0-mlp2-moca"}
    measured = ("seed", "mir", "error", "held_out_loss")

    def of(rows):
        return [tuple(row[name] for name in measured) for row in rows]

    same = of(row for row in table(finished, "data") if row["images"] == TINY.reference)
    assert same == of(row for row in table(finished, "projector") if row["projector"] == "mlp2")
    assert same[:1] == of(row for row in table(finished, "moca") if row["moca"] == "False")
    largest = of(row for row in table(finished, "data") if row["images"] == TINY.images[-1])
    assert largest == of(row for row in table(finished, "training") if row["step"] == 2)


def test_the_curve_of_a_training_begins_before_the_first_step(finished):
    assert [row["step"] for row in table(finished, "training")] == [0, 1, 2, 0, 1, 2]


def test_a_second_run_writes_the_tables_that_it_is_asked_for_and_no_unit(finished, llama, tmp_path):
    out, work = finished
    before = {file.name: file.stat().st_mtime_ns for file in work.iterdir()}
    reproduced(llama, tmp_path, work, "--only", "samples", "moca")
    assert {file.name: file.stat().st_mtime_ns for file in work.iterdir()} == before
    again = {file.name: file.read_text() for file in tmp_path.glob("*.csv")}
    assert again == {name: (out / name).read_text() for name in ("reproduce_samples.csv", "reproduce_moca.csv")}


def test_only_a_unit_whose_file_is_gone_is_done_again_and_alike(finished, llama, tmp_path, monkeypatch):
    out, work = finished
    (work / "train-4-seed1-mlp2.json").unlink()
    done = []
    train = Workshop._train
    monkeypatch.setattr(Workshop, "_train", lambda self, training: done.append(training.name) or train(self, training))
    reproduced(llama, tmp_path, work)
    assert done == ["train-4-seed1-mlp2"]
    for name in reproduce.EXPERIMENTS:
        file = f"reproduce_{name}.csv"
        assert (tmp_path / file).read_text() == (out / file).read_text()


def test_a_unit_made_of_something_else_is_done_again(finished, llama, monkeypatch):
    monkeypatch.setattr(Workshop, "_train", lambda self, training: ["anew"])
    training = Training(images=TINY.reference, seed=1, projector="linear")
    same = Workshop(finished[1], TINY, llama, Console(quiet=True))
    assert same.train(training) != ["anew"]
    before = (finished[1] / f"{training.name}.json").read_text()
    other = Workshop(finished[1], replace(TINY, learning_rate=1e-3), llama, Console(quiet=True))
    assert other.train(training) == ["anew"]
    (finished[1] / f"{training.name}.json").write_text(before)


def test_a_stopped_unit_leaves_no_result(shop):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shop.unit("one", {"of": 1}, stopped)
    assert not list(shop.folder.iterdir())
    assert shop.unit("one", {"of": 1}, lambda: [2.5]) == [2.5]
    assert shop.unit("one", {"of": 1}, stopped) == [2.5]
    assert json.loads((shop.folder / "one.json").read_text())["depends"]["of"] == 1


def test_moca_starts_from_the_first_weights_of_the_training_without(shop):
    plain, with_moca, other = (
        shop._build(training)[0]
        for training in (Training(images=4, seed=0), Training(images=4, seed=0, moca=True), Training(images=4, seed=1))
    )
    first, same, different = (m.model.multi_modal_projector.linear_1.weight for m in (plain, with_moca, other))
    assert torch.equal(first, same)
    assert not torch.equal(first, different)
    assert any(MOCA in name for name, _ in with_moca.named_parameters())


def test_the_trained_model_has_the_projector_that_was_kept(finished, llama):
    shop = Workshop(finished[1], TINY, llama, Console(quiet=True))
    (row,) = [row for row in table(finished, "content") if row["images"] == "all" and row["text"] == "reference"][:1]
    again = shop.samples(TINY.samples, reproduce.prose(), reproduce.demo.Pictures(0))
    measured = reproduce.demo.measure(*shop.trained, again, groups=TINY.groups).value
    assert measured == pytest.approx(row["mir"], rel=1e-5)


def test_probes_are_on_the_way_only_for_a_curve():
    largest = Scale().images[-1]
    assert Training(images=largest, seed=0, curve=True).probes == [0, 5, 10, 20, 40, 80]
    assert Training(images=160, seed=0).probes == [40]


def row(**values):
    return {"error": 0.01, "held_out_loss": 1.0, "mir_without_sinks": None, **values}


def test_the_moca_table_ends_with_the_difference_within_each_seed():
    rows = [row(moca="False", seed=seed, mir=1.5 + seed) for seed in (0, 1, 2)]
    rows += [row(moca="True", seed=seed, mir=1.5 + seed + change) for seed, change in enumerate((-0.1, -0.2, -0.3))]
    head, _, without, _, difference = reproduce_tables.lines("moca", rows)
    assert head.startswith("| MoCa | MIR, seed 0 | MIR, seed 1 | MIR, seed 2 | MIR, mean | held-out loss, seed 0 |")
    assert without.startswith("| without | 1.500 +- 0.010 | 2.500 +- 0.010 | 3.500 +- 0.010 | 2.500 | 1.000 |")
    assert difference.startswith("| difference | -0.100 | -0.200 | -0.300 | -0.200 +- 0.058 | +0.000 |")


def test_rank_correlation_is_taken_within_a_seed():
    # Seed 1 is far above seed 0, so the pooled values would correlate.
    rows = [row(images=n, seed=0, mir=1.0 - n / 100, held_out_loss=1.0 + n / 100) for n in (1, 2, 3)]
    rows += [row(images=n, seed=1, mir=9.0 - n / 100, held_out_loss=9.0 - n / 100) for n in (1, 2, 3)]
    assert reproduce_tables.lines("data", rows)[-1] == (
        "Rank correlation (Spearman) of MIR with the held-out loss over the 3 sizes: -1.00 (seed 0), +1.00 (seed 1)."
    )


def test_the_content_table_sets_its_spread_against_its_errors():
    cells = [("digits", "a", "chat", 1.0), ("emoji", "a", "chat", 1.2), ("all", "a", "chat", 1.1)]
    cells += [("all", "b", "chat", 1.15), ("all", "a", "plain", 4.0)]
    rows = [row(images=i, text=t, template=p, mir=mir) for i, t, p, mir in cells]
    rows[-1]["mir_without_sinks"] = 1.05
    lines = reproduce_tables.lines("content", rows)
    assert lines[-3] == "| all | a | plain | 4.000 +- 0.010 | 1.050 |"
    assert lines[-1] == (
        "MIR spans 0.200 over the kinds of pictures and 0.050 over the kinds of text; "
        "the largest standard error of these is 0.010."
    )


def test_the_normalization_table_names_the_extremes_of_both_curves():
    rows = [{"layer": n, "normalized": 4.0 / n, "unnormalized": u} for n, u in ((1, 5.0), (2, 3.0), (3, 70.0))]
    head, _, normalized, unnormalized = reproduce_tables.lines("normalization", rows)
    assert head == "| normalisation | layer 1 | least | greatest | layer 3 |"
    assert normalized == "| with | 4 | 1.33 (layer 3) | 4 (layer 1) | 1.33 |"
    assert unnormalized == "| without | 5 | 3 (layer 2) | 70 (layer 3) | 70 |"
