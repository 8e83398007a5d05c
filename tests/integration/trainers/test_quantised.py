"""MoCa over a base that bitsandbytes has quantised, alone and with LoRA in transformers' Trainer (QLoRA)."""

import pytest
import torch
import transformers

from integration.calibrated_models import ROWS, loss_of
from integration.tiny_models import HIDDEN, LAYERS, tiny_batch, tiny_model
from integration.tiny_trainers import Captions, probe_of
from modality_integration import add_moca, capture, load_moca, measure_mir, moca_parameters, save_moca
from modality_integration.models.moca import NAME
from tolerances import assert_close

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.slow

QUANTISED = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}}
BOTH = pytest.mark.parametrize("bits", [8, 4])
PACKED = {8: torch.int8, 4: torch.uint8}
STEPS, RATE = 6, 1e-2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny LLaVA in files, to be loaded quantised."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llava", dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_layout_of_weights(monkeypatch):
    """Disables the layout that CPUs with bf16 instructions give 4-bit weights of 32 rows, 64 columns in eval mode."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


def loaded(files, bits, dtype=torch.bfloat16):
    options = {} if bits is None else {"quantization_config": transformers.BitsAndBytesConfig(**QUANTISED[bits])}
    return transformers.LlavaForConditionalGeneration.from_pretrained(files, dtype=dtype, **options)


def with_moca(model, **options):
    torch.manual_seed(0)
    add_moca(model, std=0.3, **options)
    return model


def batch_for(model, rows=ROWS):
    return tiny_batch(model, "llava", rows)


def packed_weights(model, bits):
    """The quantised weights by name, without the parts that LoRA's wrappers add to names."""
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.dtype == PACKED[bits]
    }
    assert len(found) > 7 * LAYERS  # those of the language model; there is also a vision tower
    return found


@BOTH
def test_moca_is_float32_and_trains_while_the_base_stays(files, bits, tmp_path):
    model = loaded(files, bits)
    before = {name: weight.detach().clone() for name, weight in packed_weights(model, bits).items()}
    report = add_moca(model)
    assert {(site.dtype, site.hidden_size) for site in report.sites} == {(torch.float32, HIDDEN)}
    optimizer = torch.optim.AdamW(moca_parameters(model), lr=RATE, weight_decay=0.0)
    batch, losses = batch_for(model), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in moca_parameters(model))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for i, parameter in enumerate(moca_parameters(model)):
        assert parameter.dtype == torch.float32
        assert (parameter.detach() != (i + 1) % 2).all()
    for name, weight in packed_weights(model, bits).items():
        assert not weight.requires_grad
        assert torch.equal(weight, before[name])

    again = loaded(files, bits)
    load_moca(again, save_moca(model, tmp_path))
    for parameter, trained in zip(moca_parameters(again), moca_parameters(model), strict=True):
        assert torch.equal(parameter, trained)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch.inputs).logits, model.eval()(**batch.inputs).logits)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_roles_and_states_are_those_of_a_model_that_is_not_quantised(files, bits, dtype):
    model, calibrated = loaded(files, bits, dtype).eval(), with_moca(loaded(files, bits, dtype)).eval()
    batch, states = batch_for(model), []
    for each in (model, calibrated):
        with torch.no_grad(), capture(each) as seen:
            each(**batch.inputs)
        assert torch.equal(seen.vision_mask, batch.vision)
        assert torch.equal(seen.text_mask, batch.text_after)
        assert {state.dtype for state in seen.hidden_states} == {dtype}
        states.append(seen.hidden_states[0])
    assert torch.equal((states[0] != states[1]).any(-1), batch.vision)
    scale, shift = moca_parameters(calibrated)[:2]
    assert_close(states[1][batch.vision], (scale * states[0] + shift)[batch.vision])


@BOTH
def test_the_fused_way_and_mir_are_as_the_plain_way(files, bits):
    fused, plain = (with_moca(loaded(files, bits, torch.float32), fused=way).eval() for way in (True, False))
    batch = batch_for(fused, ["ttitttttt"] * 6)
    with torch.no_grad():
        assert_close(fused(**batch.inputs).logits, plain(**batch.inputs).logits, factor=10)
    values = [measure_mir(each, [batch.inputs]).value for each in (fused, plain)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("order", ["moca first", "lora first"])
def test_trainer_trains_lora_and_moca_and_the_folder_loads(files, bits, order, tmp_path):
    """The steps of QLoRA: a base prepared for k-bit training, adapters, transformers' Trainer, its checkpoint."""

    def adapted(**options):
        targets = r".*language_model.*\.(q_proj|v_proj)"
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, **options))

    model = loaded(files, bits)
    if bits is not None:
        model = peft.prepare_model_for_kbit_training(model)
    if order == "moca first":
        add_moca(model)
        model = adapted(modules_to_save=[NAME])
    else:
        model = adapted()
        add_moca(model)
    base = {} if bits is None else {n: w.detach().clone() for n, w in packed_weights(model, bits).items()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=RATE, report_to=[],
        save_strategy="steps", save_steps=STEPS, use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Captions(model))
    measured = [measure_mir(trainer.model, probe_of(trainer)).value]
    trainer.train()
    measured.append(measure_mir(trainer.model, probe_of(trainer)).value)
    assert measured[0] != measured[1]
    trained = [parameter.detach().clone() for parameter in moca_parameters(trainer.model)]
    assert [(value.dtype, value.shape) for value in trained] == [(torch.float32, (HIDDEN,))] * 2 * LAYERS
    assert all((value != (i + 1) % 2).all() for i, value in enumerate(trained))
    loras = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert loras
    assert all(p.any() for p in loras)
    for name, weight in base.items():
        assert torch.equal(packed_weights(trainer.model, bits)[name], weight)

    paths = [save_moca(trainer.model, tmp_path / "moca")]
    if order == "moca first":  # in modules_to_save, so the adapter's file contains it
        paths.append(tmp_path / f"checkpoint-{STEPS}")
    for path in paths:
        again = loaded(files, bits)
        load_moca(again, path)
        for parameter, value in zip(moca_parameters(again), trained, strict=True):
            assert torch.equal(parameter, value)
