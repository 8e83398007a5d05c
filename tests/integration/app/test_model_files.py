"""Folders without a transformers model: each is refused in one line that says what it holds and what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from modality_integration.app import loading
from modality_integration.app.errors import InputError

ZERO = r"its weights are DeepSpeed shards; merge them with: python .*/zero_to_fp32.py .* --safe_serialization"
FSDP = r"its weights are FSDP shards; merge them with: accelerate merge-weights .*/pytorch_model_fsdp_0 "
NO_CONFIG = r"has no config.json"
NO_WEIGHTS = r"has a config.json but no weights"
OF_CONFIG = r"get config.json from the model that was trained"


def refused(folder):
    with pytest.raises(InputError) as said:
        loading.load(str(folder), torch.device("cpu"))
    assert "\n" not in str(said.value)
    return str(said.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], rf"{NO_CONFIG}: the folder is empty"),
        (["notes.txt"], rf"{NO_CONFIG}\Z"),
        (["config.json"], rf"{NO_WEIGHTS}\Z"),
        (["config.json", "global_step20/zero_pp_rank_0_mp_rank_00_optim_states.pt"], rf"{NO_WEIGHTS}: .*{ZERO}\Z"),
        (["global_step20/mp_rank_00_model_states.pt", "zero_to_fp32.py"], rf"{NO_CONFIG}: .*{ZERO}; {OF_CONFIG}"),
        (
            ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
            "DeepSpeed checkpoint shards",
        ),
        (["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"], rf"{NO_CONFIG}: .*{FSDP}.*; {OF_CONFIG}"),
        (["config.json", "pytorch_model_fsdp_0/__0_0.distcp"], rf"{NO_WEIGHTS}: .*{FSDP}[^;]*\Z"),
        (["__0_0.distcp", "__1_0.distcp"], r"FSDP shards; .*accelerate merge-weights"),
        (["trainer_state.json", "optimizer.pt", "scheduler.pt"], "holds the state of a trainer but no model"),
        (["config.json", "optimizer.bin", "random_states_0.pkl"], "holds the state of a trainer but no model"),
        (["model.safetensors", "optimizer.bin"], rf"{NO_CONFIG} next to its weights"),
        (["moca.safetensors"], "moca.safetensors belongs in the folder of its model"),
        (["model-Q4.gguf"], "GGUF files are not supported"),
        (["a/config.json", "b/config.json", "c/words.txt"], r"but its sub-folders do \(a, b\); pass one of them"),
        (["checkpoint-20/x", "checkpoint-100/x", "tmp-checkpoint-200/x"], r"the newest is --model .*/checkpoint-100\Z"),
        (
            ["config.json", "training_args.bin", "checkpoint-5/model.safetensors"],
            r"the newest is --model .*checkpoint-5\Z",
        ),
    ],
)
def test_a_folder_without_a_whole_model_is_told_by_what_it_holds(folders, tmp_path, files, said):
    for name in files:
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "given" / name).write_bytes(b"")
    (tmp_path / "given").mkdir(exist_ok=True)
    if "config.json" in files:
        shutil.copy(folders / "model" / "config.json", tmp_path / "given")
    message = refused(tmp_path / "given")
    assert message.startswith(f"model: {tmp_path / 'given'} has ")
    assert re.search(said, message), message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model_type": "llava_llama"},
            r"'llava_llama', which transformers 5\S* does not support \(a newer version may\)",
        ),
        ({"model_type": "llava_qwen", "mm_projector_type": "mlp2x_gelu"}, "'llava_qwen'.* original LLaVA code"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "'llava'.* original LLaVA code"),
        (
            {
                "model_type": "internvl_chat",
                "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
            },
            "'internvl_chat', which transformers .* does not support, and the code shipped with it is not run",
        ),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "clip"}, "'clip', for which transformers .* has no image-text-to-text class"),
    ],
)
def test_a_model_that_transformers_does_not_load_is_pointed_to_saved_states(folders, tmp_path, change, said):
    shutil.copytree(folders / "model", tmp_path / "given")
    config = json.loads((tmp_path / "given" / "config.json").read_text())
    changed = {key: value for key, value in (config | change).items() if value is not None}
    (tmp_path / "given" / "config.json").write_text(json.dumps(changed))
    message = refused(tmp_path / "given")
    assert re.search(said, message), message
    assert message.endswith(
        "write them with save_states, then run `mir states FOLDER` (docs/models.md, Models that `mir compute` cannot "
        "load)"
    )


def test_the_section_that_messages_name_is_in_the_docs():
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    assert "## Models that `mir compute` cannot load" in text
    assert "save_states" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[1]", "holds a list, not an object"),
        ("{}", "no model_type"),
    ],
)
def test_a_configuration_that_is_none_is_one_line(folders, tmp_path, text, said):
    shutil.copytree(folders / "model", tmp_path / "given")
    (tmp_path / "given" / "config.json").write_text(text)
    assert said in refused(tmp_path / "given")


def test_a_file_in_place_of_its_folder_is_refused(folders):
    assert "is a file; pass the folder that contains it" in refused(folders / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("pytorch_model.bin", "", "cannot be loaded: EOFError"),
        ("pytorch_model.bin", "words and words", "cannot be loaded: "),
        ("model.safetensors", "", "cannot be loaded: SafetensorError"),
        ("model.safetensors.index.json", "{", "cannot be loaded: "),
        ("tokenizer.json", "{", "cannot be loaded: "),
        ("tokenizer.json", '{"a": 1}', "cannot be loaded: KeyError"),
        ("processor_config.json", "[]", "holds a list"),
        (
            "processor_config.json",
            '{"image_processor": {}, "processor_class": "No"}',
            "check that it knows their processor_class",
        ),
        ("config.json", {"hidden_size": "wide"}, "expected int, got str"),
        ("config.json", {"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ("config.json", {"model_type": "odd"}, r"Unrecognized model type for subconfig: odd.* \.\.\.\Z"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_model(folders, tmp_path, file, content, said):
    given = shutil.copytree(folders / "model", tmp_path / "given")
    if file.startswith(("pytorch_model", "model")):
        (given / "model.safetensors").unlink()
    if isinstance(content, dict):
        config = json.loads((given / file).read_text())
        config["text_config"] |= content
        content = json.dumps(config)
    (given / file).write_text(content)
    message = refused(given)
    assert str(given) in message
    assert re.search(said, message), message
    assert len(message) < 700
