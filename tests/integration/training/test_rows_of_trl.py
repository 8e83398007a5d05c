"""TRL's SFTTrainer, which adds averages since the last row to each row, logs the same as without MIR's callback."""

import pytest
import torch

from integration.tiny_models import tiny_batch, tiny_model
from integration.tiny_trainers import ROWS, own_rows, tokenizer_of
from modality_integration import MIRCallback

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def sft_trainer(folder, **changes):
    torch.manual_seed(0)
    model = tiny_model("llava", dtype=torch.float32)

    def collate(rows):
        batch = tiny_batch(model, "llava", ["ttitttttt"] * len(rows), seed=rows[0]["seed"])
        return {**batch.inputs, "labels": batch.inputs["input_ids"].masked_fill(batch.vision, -100)}

    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        save_strategy="no", bf16=False, use_cpu=True, remove_unused_columns=False, disable_tqdm=True, seed=3,
        dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False, **changes,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"seed": i} for i in range(12)])
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows.select(range(4)), data_collator=collate,
        processing_class=tokenizer_of(model.config.get_text_config().vocab_size),
    )  # fmt: skip


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"logging_steps": 3},
        {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "mir"},
    ],
    ids=["trained", "evaluated"],
)
def test_every_row_of_sft_is_what_it_is_without_the_callback(tmp_path, every, changes):
    plain = sft_trainer(tmp_path, **{**changes, "metric_for_best_model": None})
    plain.train()
    watched = sft_trainer(tmp_path, **changes, greater_is_better=False)
    probe = [tiny_batch(watched.model, "llava", ROWS, seed=seed).inputs for seed in (5, 6, 7)]
    MIRCallback(probe, every=every).attach(watched)
    watched.train()
    assert own_rows(watched) == own_rows(plain)
    assert any("mean_token_accuracy" in row for row in own_rows(plain))
    assert len([row for row in watched.state.log_history if "mir" in row]) == len(range(0, 7, every))
