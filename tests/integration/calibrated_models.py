"""Tiny models with MoCa, their loss on the text tokens of a batch, and the gradients of that loss."""

import torch
from torch import nn

from integration.tiny_models import tiny_model
from modality_integration.models.moca import add_moca

ROWS = ("ttittt", "tittittt")
PROBE = ("ttitttttt",) * 6  # for MIR: every image is followed by text


def calibrated(family="llava", *, dtype=torch.float64, seed=0, std=0.3):
    model = tiny_model(family, dtype=dtype)
    torch.manual_seed(seed)
    add_moca(model, std=std)
    return model


def loss_of(model, batch):
    labels = batch.inputs["input_ids"].masked_fill(batch.vision | batch.padding, -100)
    logits = model(**batch.inputs).logits  # the models compute their own loss in float32
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
