"""The demo's model, encoder and training, with a tiny language model."""

import math

import pytest
import torch

from integration.demo_packages import needs
from integration.saved_models import tiny_tokenizer
from modality_integration.app.demo import Pictures, build, training
from modality_integration.app.demo.model import PROJECTORS, chat_template, trainable, turn_end
from modality_integration.app.demo.training import (
    BATCH,
    caption_inputs,
    caption_loss,
    held_out_loss,
    train,
    training_step,
)
from modality_integration.app.prompts import encode, prompt

pytestmark = needs()


@pytest.fixture(scope="module")
def built(llama):
    torch.manual_seed(0)
    return build(llama)


@pytest.fixture(scope="module")
def pictures():
    return Pictures(0)


def chat_tokenizer():
    """The tiny tokenizer with SmolLM2's turn markers."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"]})
    return tokenizer


def test_the_encoder_gives_the_features_of_the_network_that_the_weights_were_made_for():
    reference_package = pytest.importorskip("efficientnet_lite_pytorch")
    from modality_integration.app.demo.encoder import encoder, weights_file

    reference = reference_package.EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(weights_file(), map_location="cpu", weights_only=True))
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = reference.eval().extract_features(pixels)
        features = encoder()(pixels).last_hidden_state
    assert wanted.norm() > 0
    assert (features - wanted).norm() / wanted.norm() < 1e-4


def test_the_encoder_sees_pixels_scaled_as_it_was_trained(built, pictures):
    _, processor = built
    image = pictures.held_out(1)[0].image
    scaled = encode(processor, image, "the cat")["pixel_values"][0]
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1)
    torch.testing.assert_close(scaled, (pixels.float() - 127) / 128)


def test_only_the_projector_is_trained_and_all_of_it_is(llama, pictures):
    model, processor = build(llama)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    training_step(model, processor, pictures.training(BATCH)[:], torch.optim.AdamW(trainable(model), lr=1e-2))
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}


def test_the_projectors_first_weights_follow_from_the_seed_alone(llama, built):
    torch.manual_seed(0)
    again, _ = build(llama)
    for first, second in zip(trainable(built[0]), trainable(again), strict=True):
        assert torch.equal(first, second)
    torch.manual_seed(1)
    other, _ = build(llama)
    assert not torch.equal(trainable(again)[0], trainable(other)[0])


@pytest.mark.parametrize(("name", "layers"), [("linear", 1), ("mlp2", 2), ("mlp4", 4)])
def test_every_projector_has_its_layers_and_learns(llama, pictures, name, layers):
    assert name in PROJECTORS
    torch.manual_seed(0)
    model, processor = build(llama, projector=name)
    weights = [p for p in trainable(model) if p.dim() == 2]
    assert [tuple(w.shape) for w in weights] == [(16, 1280)] + [(16, 16)] * (layers - 1)
    batch = pictures.training(BATCH)[:]
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = [training_step(model, processor, batch, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_an_unknown_projector_is_refused(llama):
    with pytest.raises(ValueError, match="projector: expected one of linear, mlp2, mlp4, got 'mlp3'"):
        build(llama, projector="mlp3")


def test_the_loss_counts_caption_tokens_alone(built, pictures):
    _, processor = built
    batch = pictures.training(BATCH)[:]
    inputs, labels = caption_inputs(processor, batch)
    end = turn_end(processor.tokenizer)
    for ids, wanted, item in zip(inputs["input_ids"], labels, batch, strict=True):
        caption = processor.tokenizer(item.caption + end, add_special_tokens=False).input_ids
        assert wanted[wanted != -100].tolist() == caption
        assert ids[wanted != -100].tolist() == caption
        assert caption[-1] == processor.tokenizer.eos_token_id


def test_the_loss_is_the_models_own_over_the_labels(built, pictures):
    model, processor = built
    batch = pictures.training(BATCH)[:]
    inputs, labels = caption_inputs(processor, batch)
    with torch.no_grad():
        loss, tokens = caption_loss(model, processor, batch)
        own = model(**inputs, labels=labels, use_cache=False).loss
    assert tokens == (labels != -100).sum()
    assert float(loss) / tokens == pytest.approx(float(own), rel=1e-5)


def test_the_held_out_loss_is_a_mean_over_tokens_whatever_the_batch(built, pictures):
    model, processor = built
    captioned = pictures.held_out(5)[:]
    with torch.no_grad():
        alone = [caption_loss(model, processor, [item]) for item in captioned]
    mean = sum(float(loss) for loss, _ in alone) / sum(tokens for _, tokens in alone)
    for batch in (1, 2, 5):
        assert held_out_loss(model, processor, captioned, batch=batch) == pytest.approx(mean, rel=1e-5)


def test_the_learning_rate_warms_up_and_falls_to_zero_over_one_epoch(built, pictures, monkeypatch):
    model, processor = built
    rates, batches, seen = [], [], []

    def step(model, processor, batch, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        batches.extend(batch)
        optimizer.step()  # without gradients
        return 0.5

    monkeypatch.setattr(training, "training_step", step)
    stand_in = list(range(40 * BATCH))
    train(model, processor, stand_in, steps=40, learning_rate=0.1, after_step=lambda *step: seen.append(step))
    assert batches == stand_in
    assert seen == [(step, 0.5) for step in range(1, 41)]
    assert rates[:3] == pytest.approx([0.0, 0.05, 0.1])
    assert rates[2:] == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 38)) for k in range(38)])


def test_too_few_pictures_for_the_steps_are_refused(built):
    with pytest.raises(ValueError, match="captioned: expected 8 pictures for 2 steps, got 7"):
        train(*built, [None] * 7, steps=2, learning_rate=0.1)


def test_smollm2s_own_format_is_written_without_a_system_message(built):
    _, processor = built
    processor = type(processor)(processor.image_processor, chat_tokenizer(), patch_size=32)
    processor.chat_template = chat_template(processor.tokenizer)
    wanted = '<|im_start|>user\n<image>the cat\'s "house"<|im_end|>\n'
    assert prompt(processor, 'the cat\'s "house"', "chat") == wanted
    asked = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|im_start|>user\n<image><|im_end|>\n<|im_start|>assistant\n"
    spoken = processor.apply_chat_template([{"role": "assistant", "content": "a cat"}], tokenize=False)
    assert spoken == "<|im_start|>assistant\na cat<|im_end|>\n"


@pytest.mark.parametrize("bos", [True, False], ids=["with BOS", "without BOS"])
def test_a_tokenizer_without_markers_still_gets_something_before_the_image(built, bos):
    _, processor = built
    tokenizer = tiny_tokenizer()
    if not bos:
        tokenizer.bos_token = None
    processor = type(processor)(processor.image_processor, tokenizer, patch_size=32)
    processor.chat_template = chat_template(tokenizer)
    whole = prompt(processor, "the cat", "chat")
    assert whole.startswith("<s>user" if bos else "user")
    assert whole.index("<image>") > 0
    assert whole.index("<image>") < whole.index("the cat")


def test_no_vision_token_stands_first_and_an_image_has_49(built, pictures):
    model, processor = built
    image = pictures.held_out(1)[0].image
    ids = encode(processor, image, "the cat", "chat")["input_ids"][0]
    vision = (ids == model.config.image_token_id).nonzero().flatten().tolist()
    assert len(vision) == 49
    assert vision[0] > 0
    assert ids[0] == processor.tokenizer.bos_token_id
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1
