"""MoCa on a quantised base in TRL's SFTTrainer, which casts trained parameters to bf16."""

import pytest
import torch
import transformers

from integration.tiny_models import tiny_batch, tiny_model
from integration.tiny_trainers import tokenizer_of
from modality_integration import add_moca, moca_parameters

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.slow

QUANTISED = {
    8: {"load_in_8bit": True},
    4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
}
STEPS, RATE = 8, 1e-3


@pytest.fixture
def base(tmp_path):
    """A tiny LLaVA in files, with a tokenizer, which SFTTrainer requires."""
    model = tiny_model("llava", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    words = tokenizer_of(model.config.get_text_config().vocab_size)
    return tmp_path / "base", words


def sft_trainer(base, folder, bits):
    files, words = base
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        files, quantization_config=transformers.BitsAndBytesConfig(**QUANTISED[bits]), dtype=torch.bfloat16
    )
    add_moca(model)

    def collate(rows):
        batch = tiny_batch(model, "llava", ["ttitttttt"] * len(rows), seed=rows[0]["seed"])
        return {**batch.inputs, "labels": batch.inputs["input_ids"].masked_fill(batch.vision, -100)}

    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=RATE, report_to=[],
        lr_scheduler_type="constant", save_strategy="no", bf16=True, use_cpu=True, remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, gradient_checkpointing=False, seed=3,
    )  # fmt: skip
    saved = peft.LoraConfig(
        target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, modules_to_save=["modality_layernorm"]
    )
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list([{"seed": i} for i in range(16)]),
        data_collator=collate, processing_class=words, peft_config=saved,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
def test_the_cast_is_told_of_and_no_scale_moves(base, tmp_path, bits):
    trainer = sft_trainer(base, tmp_path, bits)
    assert {p.dtype for p in moca_parameters(trainer.model)} == {torch.bfloat16}
    with pytest.warns(UserWarning, match=r"MoCa: in bfloat16, .* a scale of 1 unchanged.*p\.data = p\.data\.float\(\)"):
        trainer.train()
    assert all((scale == 1).all() for scale in moca_parameters(trainer.model)[::2])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_way_out_trains_every_scale_and_shift(base, tmp_path, bits, recwarn):
    trainer = sft_trainer(base, tmp_path, bits)
    for parameter in moca_parameters(trainer.model):
        parameter.data = parameter.data.float()
    trainer.train()
    assert not [w for w in recwarn if "MoCa" in str(w.message)]
    for i, parameter in enumerate(moca_parameters(trainer.model)):
        moved = (parameter.detach() - (i + 1) % 2).abs()
        assert moved.min() > 0
        assert moved.max() > RATE  # AdamW moves about RATE per step
