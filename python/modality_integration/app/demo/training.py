"""Training of the projector on captions, and the loss on held-out captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modality_integration.app.demo.model import trainable, turn_end
from modality_integration.app.demo.pictures import Captioned

BATCH = 4
WARM_UP = 0.05  # fraction of all steps
CLIP = 1.0  # gradient norm


def train(
    model: Any,
    processor: Any,
    captioned: Sequence[Captioned],
    *,
    steps: int,
    learning_rate: float,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Take `steps` AdamW steps on BATCH pictures each, in the order of `captioned`: one epoch.

    The learning rate rises to `learning_rate` over the first 5 % of the steps, then falls to 0 along a cosine.
    Gradients are clipped to norm 1; there is no weight decay. `after_step(step, loss)` is called after each step,
    counted from 1, with the loss of its batch before the step, in nats per token. Raises ValueError for fewer than
    steps x BATCH pictures.
    """
    from transformers import get_cosine_schedule_with_warmup

    if len(captioned) < steps * BATCH:
        raise ValueError(f"captioned: expected {steps * BATCH} pictures for {steps} steps, got {len(captioned)}")
    optimizer = torch.optim.AdamW(trainable(model), lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    for step in range(steps):
        loss = training_step(model, processor, captioned[step * BATCH : (step + 1) * BATCH], optimizer)
        schedule.step()
        after_step(step + 1, loss)


def training_step(model: Any, processor: Any, batch: Sequence[Captioned], optimizer: torch.optim.Optimizer) -> float:
    """Take one step on the captions' next-token loss and return that loss (nats per token)."""
    total, tokens = caption_loss(model, processor, batch)
    loss = total / tokens
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable(model), CLIP)
    optimizer.step()
    return loss.item()


@torch.inference_mode()
def held_out_loss(model: Any, processor: Any, captioned: Sequence[Captioned], batch: int = 8) -> float:
    """Mean next-token loss of the captions, in nats per token."""
    total, tokens = 0.0, 0
    for start in range(0, len(captioned), batch):
        loss, count = caption_loss(model, processor, captioned[start : start + batch])
        total, tokens = total + loss.item(), tokens + count
    return total / tokens


def caption_loss(model: Any, processor: Any, batch: Sequence[Captioned]) -> tuple[Tensor, int]:
    """Summed next-token loss of the captions (nats) and the number of their tokens, including the end of turn.

    In the conversation, the user sends the image and the assistant answers with the caption.
    """
    inputs, labels = caption_inputs(processor, batch)
    # All prompts have the same length: compute logits only where the next token belongs to a caption.
    prompt = int((labels != -100).float().argmax(1).min())
    length = labels.shape[1]
    kept = torch.arange(prompt - 1, length - 1, dtype=torch.int64, device=labels.device)
    logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    wanted = labels[:, prompt:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    return loss, int((wanted != -100).sum())


def caption_inputs(processor: Any, batch: Sequence[Captioned]) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs for a batch and labels (B, T): captions with their end of turn, -100 elsewhere."""
    tokenizer = processor.tokenizer
    question = [{"role": "user", "content": [{"type": "image"}]}]
    prompt = processor.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    inputs = dict(
        processor(
            images=[item.image for item in batch],
            text=[prompt] * len(batch),
            add_special_tokens=False,  # the template already has them
            return_tensors="pt",
        )
    )
    end = turn_end(tokenizer)
    captions = [tokenizer(item.caption + end, add_special_tokens=False)["input_ids"] for item in batch]
    longest = max(map(len, captions))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    integers = partial(torch.tensor, dtype=torch.int64, device="cpu")
    ids = integers([caption + [padding] * (longest - len(caption)) for caption in captions])
    real = integers([[1] * len(caption) + [0] * (longest - len(caption)) for caption in captions])
    before = inputs["input_ids"]
    labels = torch.cat([torch.full_like(before, -100), ids.masked_fill(real == 0, -100)], 1)
    inputs["input_ids"] = torch.cat([before, ids], 1)
    inputs["attention_mask"] = torch.cat([torch.ones_like(before), real], 1)
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}, labels
