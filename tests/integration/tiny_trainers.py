"""transformers' Trainer for a tiny LLaVA with images, and a probe set for it."""

import torch
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from integration.tiny_models import tiny_batch, tiny_model

ROWS = ["tittttttt", "ttitttttt"]


class Captions(torch.utils.data.Dataset):
    """Eight rows with one image each."""

    def __init__(self, model):
        self.batch = tiny_batch(model, "llava", ["ttitttt"] * 8)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        row = {name: value[i] for name, value in self.batch.inputs.items()}
        return {**row, "labels": row["input_ids"].masked_fill(self.batch.vision[i], -100)}


def trainer_of(
    tmp_path, *, kind=Trainer, model=None, learning_rate=1e-2, steps=6, evaluated=False, callbacks=(), **changes
):
    model = tiny_model("llava", dtype=torch.float32) if model is None else model
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.2  # so that the random state matters
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, learning_rate=learning_rate,
        report_to=[], disable_tqdm=True, seed=3,
        **{"logging_steps": 1, "save_strategy": "no", "use_cpu": True, **changes},
    )  # fmt: skip
    rows = Captions(model)
    return kind(
        model, arguments, train_dataset=rows, eval_dataset=rows if evaluated else None, callbacks=list(callbacks)
    )


def probe_of(trainer, seeds=(5, 6, 7)):
    return [tiny_batch(trainer.model, "llava", ROWS, seed=seed).inputs for seed in seeds]


def own_rows(trainer):
    """The trainer's own log rows: all except MIR's, without timings."""
    clock = ("runtime", "per_second")
    rows = [{k: v for k, v in row.items() if not k.endswith(clock)} for row in trainer.state.log_history]
    return [row for row in rows if not any("mir" in name for name in row)]


def tokenizer_of(size):
    """A tokenizer with `size` words, which TRL's trainers require."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w2"
    )
