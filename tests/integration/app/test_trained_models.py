"""Models saved by transformers' Trainer: checkpoints with and without a processor, and where it is found."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from integration.app.compute_runs import quiet_run
from integration.saved_models import save_tiny_llava
from modality_integration.app import loading
from modality_integration.app.errors import InputError

CPU = torch.device("cpu")
NONE, TOKENIZER, PROCESSOR = "none", "tokenizer", "processor"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model folder `base`, and a run trained from it for each possible processing_class of Trainer."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

    root = tmp_path_factory.mktemp("trained")
    save_tiny_llava(root / "base")
    with loading.quiet():
        processor = AutoProcessor.from_pretrained(root / "base")
        batch = processor(images=[Image.new("RGB", (16, 16))], text=["<image>\nthe cat sits"], return_tensors="pt")
        row = {name: value[0] for name, value in batch.items()}
        rows = [{**row, "labels": row["input_ids"]}] * 4
        for kind, given in ((NONE, None), (TOKENIZER, processor.tokenizer), (PROCESSOR, processor)):
            model = AutoModelForImageTextToText.from_pretrained(root / "base")
            arguments = TrainingArguments(
                output_dir=str(root / kind), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[],
                use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
            )  # fmt: skip
            Trainer(model, arguments, train_dataset=rows, processing_class=given).train()
    return root


@pytest.fixture
def alone(trained, tmp_path, monkeypatch):
    """A checkpoint in an otherwise empty folder, by the processing_class of its Trainer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def copy(kind):
        return shutil.copytree(trained / kind / "checkpoint-2", tmp_path / "away" / "run" / "checkpoint-2")

    return copy


def load(folder, **options):
    return loading.load(str(folder), CPU, **options)


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [(NONE, "has no processor; using the processor of"), (TOKENIZER, "has no image processor; using the processor of")],
)
def test_a_checkpoint_without_its_processor_takes_that_of_the_model_beside_its_run(options, trained, kind, said):
    checkpoint = trained / kind / "checkpoint-2"
    result = quiet_run(options, model=str(checkpoint), samples=4)
    (note,) = [note for note in result.notes if "processor" in note]
    assert note == f"{checkpoint} {said} {trained / 'base'}, of the same configuration"
    given = quiet_run(options, model=str(checkpoint), samples=4, processor=str(trained / "base"), out=options.out / "b")
    assert given.value == result.value
    assert f"using the processor of {trained / 'base'}" in given.notes


def test_a_checkpoint_with_its_processor_takes_it_and_says_nothing(trained):
    assert load(trained / PROCESSOR / "checkpoint-2").notes == []


@pytest.mark.parametrize(("kind", "lacks"), [(NONE, "processor"), (TOKENIZER, "image processor")])
def test_without_any_the_message_names_the_option(alone, kind, lacks):
    with pytest.raises(InputError, match=rf"\Amodel: .*checkpoint-2 has no {lacks} .* with --processor\Z"):
        load(alone(kind))


def beside(folder, base):
    shutil.copytree(base, folder.parent / "a-model")


def around(folder, base):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder.parent)


def in_config(folder, base):
    edit(folder / "config.json", _name_or_path=str(base))


def in_config_from_elsewhere(folder, base):
    shutil.copytree(base, folder.parents[2] / "models" / "a-model")
    edit(folder / "config.json", _name_or_path="models/a-model")


def in_state(folder, base):
    edit(folder / "trainer_state.json", stateful_callbacks={"MIRCallback": {"mir": {"trained_from": str(base)}}})


def in_cache(folder, base):
    shutil.copytree(base, folder.parents[2] / "cache" / "models--a--model" / "snapshots" / "0123")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (beside, r"run/a-model, of the same configuration\Z"),
        (around, r"run, the folder that contains it\Z"),
        (in_config, r"base, which it was trained from\Z"),
        (in_config_from_elsewhere, r"models/a-model, which it was trained from\Z"),
        (in_state, r"base, which it was trained from\Z"),
        (in_cache, r"of a/model, of the same configuration\Z"),
    ],
)
def test_the_processor_is_found_where_the_model_came_from_and_the_note_says_where(trained, alone, place, said):
    checkpoint = alone(NONE)
    place(checkpoint, trained / "base")
    (note,) = load(checkpoint).notes
    assert note.startswith(f"{checkpoint} has no processor; using the processor of ")
    assert re.search(said, note)


def another_size(base):
    edit(base / "config.json", vision_feature_layer=-1)


def another_marker(base):
    edit(base / "config.json", model_type="llava_next")


def broken(base):
    (base / "config.json").write_text("{")


@pytest.mark.parametrize("change", [another_size, another_marker, broken])
def test_a_processor_of_another_model_close_by_is_not_taken(trained, alone, change):
    checkpoint = alone(NONE)
    change(shutil.copytree(trained / "base", checkpoint.parent / "a-model"))
    with pytest.raises(InputError, match="--processor"):
        load(checkpoint)


def test_of_several_processors_that_differ_none_is_taken_and_all_are_named(trained, alone):
    checkpoint = alone(NONE)
    for name, size in (("a", 16), ("b", 16), ("c", 14)):
        other = shutil.copytree(trained / "base", checkpoint.parent / name)
        own = json.loads((other / "processor_config.json").read_text())
        own["image_processor"]["size"]["shortest_edge"] = size + 2
        (other / "processor_config.json").write_text(json.dumps(own))
    with pytest.raises(
        InputError, match=r"--processor; models of the same configuration have different processors: .*/a, .*/c\Z"
    ):
        load(checkpoint)


def test_a_processor_whose_words_are_others_than_the_tokenizer_beside_the_model_is_not_taken(trained, alone):
    checkpoint = alone(TOKENIZER)
    in_config(checkpoint, trained / "base")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(InputError, match="does not match: its tokenizer has another vocabulary"):
        load(checkpoint)


def test_a_model_that_is_gone_is_named_with_the_option(alone):
    checkpoint = alone(NONE)
    edit(checkpoint / "config.json", _name_or_path="/gone/model")
    with pytest.raises(InputError, match=r"--processor; its files say .* trained from /gone/model \(.*exist\)"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("./gone", r"\Aprocessor: ./gone does not exist\Z"),
        ("tokenizer/checkpoint-2", r"\Aprocessor: .* has no image processor\Z"),
        ("none/checkpoint-2", r"\Aprocessor: .* has no processor\Z"),
        ("base/config.json", r"\Aprocessor: .* is a file; pass the folder"),
        (
            "other",
            r"\Aprocessor: .*other belongs to another model than .*: its image token is \d+, that of the model is 4",
        ),
    ],
)
def test_a_processor_that_cannot_be_the_models_is_refused_by_its_argument(trained, tmp_path, given, said):
    if given == "other":
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(trained / "base")
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
        processor.image_token = "<picture>"
        processor.save_pretrained(trained / "other")
    name = given if given.startswith(".") else str(trained / given)
    with pytest.raises(InputError, match=said):
        load(trained / NONE / "checkpoint-2", processor=name)


def test_the_newest_checkpoint_in_the_folder_of_a_run_is_named(trained, tmp_path):
    for step in (9, 100, 20):
        shutil.copytree(trained / PROCESSOR / "checkpoint-2", tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(
        InputError, match=r"checkpoint-9, checkpoint-20, .*\); the newest is --model .*/checkpoint-100\Z"
    ):
        load(tmp_path / "run")


def test_a_revision_is_of_a_hub_name(trained):
    with pytest.raises(InputError, match=r"\Arevision: applies only to a hub name, but .* is a local folder"):
        load(trained / "base", revision="main")
