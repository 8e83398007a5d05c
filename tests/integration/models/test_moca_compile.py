"""MoCa under torch.compile: one graph for every mask and length."""

import pytest
import torch
from torch import nn

from integration.calibrated_models import ROWS, calibrated
from integration.tiny_models import HIDDEN, tiny_batch, tiny_model
from modality_integration.models.moca import add_moca
from tolerances import assert_close


class Decoder(nn.Module):
    """A minimal model for MoCa: residual layers and an argument that marks the vision tokens."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(2))
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, x, marks):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Residual(nn.Linear):
    def __init__(self):
        super().__init__(HIDDEN, HIDDEN)

    def forward(self, x):
        return x + torch.tanh(super().forward(x))


def test_compiles_in_one_graph_and_serves_every_mask_and_length():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Decoder()
    add_moca(model, std=0.3, vision_mask="marks")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (9, 12, 1):
        x = torch.randn(2, length, HIDDEN)
        for marks in (torch.arange(length) % 3 == 1, torch.arange(length) > 5, torch.zeros(length).bool()):
            marks = marks.expand(2, length)
            expected, out = model(x, marks), compiled(x, marks)
            assert_close(out, expected)
            ours = torch.autograd.grad(out.square().mean(), list(model.layers.parameters()), allow_unused=True)
            reference = torch.autograd.grad(
                expected.square().mean(), list(model.layers.parameters()), allow_unused=True
            )
            for gradient, exact in zip(ours, reference, strict=True):
                if exact is not None:
                    assert_close(gradient, exact, factor=3)
                elif gradient is not None:  # without an image: zeros if compiled, None if eager
                    assert not gradient.any()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # unfused; fused only in eager mode
def test_a_compiled_vision_language_model_gives_the_same_logits_and_breaks_no_more_graphs(dtype):
    breaks = []
    for with_moca in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = calibrated(dtype=dtype) if with_moca else tiny_model("llava", dtype=dtype)
        compiled = torch.compile(model, backend="aot_eager")
        for rows in (ROWS, ("titttt",)):
            batch = tiny_batch(model, "llava", rows)
            with torch.no_grad():
                found, expected = compiled(**batch.inputs).logits, model(**batch.inputs).logits
                assert torch.equal(found, expected) or (dtype == torch.float32 and with_moca)
                assert_close(found, expected)
        breaks.append(sum(torch._dynamo.utils.counters["graph_break"].values()))
    torch._dynamo.reset()
    assert breaks[1] == breaks[0]
