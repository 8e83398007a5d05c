"""Which tokens MoCa treats as vision tokens, per pass and per thread, and which tensors it must not overwrite."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from integration.calibrated_models import ROWS, calibrated, loss_of
from integration.tiny_models import HIDDEN, decoder_of, tiny_batch, tiny_model
from modality_integration.models.calibration import calibration_of
from modality_integration.models.moca import NAME, add_moca, remove_moca, vision_tokens
from tolerances import assert_close


def test_a_mask_of_the_caller_replaces_the_marker():
    model = calibrated()
    batch = tiny_batch(model, "llava", ["titttt"])
    with torch.no_grad():
        marked = model(**batch.inputs).logits
        with vision_tokens(model, batch.vision):
            assert torch.equal(model(**batch.inputs).logits, marked)
        with vision_tokens(model, torch.zeros_like(batch.vision)):
            nothing = model(**batch.inputs).logits
        assert torch.equal(model(**batch.inputs).logits, marked)
        embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
        with pytest.raises(ValueError, match="inputs_embeds alone do not mark them"):
            model(inputs_embeds=embeds)
    remove_moca(model)
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, nothing)


def test_a_layer_run_outside_the_model_is_an_error_and_not_a_guess():
    model = calibrated()
    layer = decoder_of(model, "llava")[0][0]
    x = torch.randn(1, 5, HIDDEN, dtype=torch.float64)
    rotary = model.model.language_model.rotary_emb(x, position_ids=torch.arange(5)[None])
    with pytest.raises(RuntimeError, match="outside a forward pass"):
        layer(x, position_embeddings=rotary)
    vision = torch.tensor([[0, 1, 1, 0, 0]])
    with torch.no_grad(), vision_tokens(model, vision):
        out = layer(x, position_embeddings=rotary)
        with vision_tokens(model, vision * 0):
            plain = layer(x, position_embeddings=rotary)
    assert torch.equal(out[:, [0, 3, 4]], plain[:, [0, 3, 4]])
    moca = layer.get_submodule(NAME)
    assert_close(out[:, 1:3], plain[:, 1:3] * moca.scale + moca.shift)


def test_a_forward_after_an_interrupted_one_goes_by_its_own_mask():
    model, interrupted = calibrated(), calibrated()
    first, second = (tiny_batch(model, "llava", [row]) for row in ("itttt", "tttti"))

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = decoder_of(interrupted, "llava")[0][1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupted(**first.inputs)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(interrupted(**second.inputs).logits, model(**second.inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # unfused; fused
def test_threads_in_one_model_go_by_their_own_masks(dtype):
    model = calibrated(dtype=dtype)
    batches = [tiny_batch(model, "llava", [row]) for row in ("itttt", "tttti")]
    layer = decoder_of(model, "llava")[0][0]
    with torch.no_grad():
        expected = [model(**batch.inputs).logits for batch in batches]
        # The first thread waits inside its first layer until the second one has finished its pass.
        inside, through = threading.Event(), threading.Event()
        main = threading.get_ident()

        def wait(*_):
            if threading.get_ident() != main:
                inside.set()
                assert through.wait(60)

        layer.mlp.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(torch.no_grad()(lambda: model(**batches[0].inputs).logits))
            assert inside.wait(60)
            found = model(**batches[1].inputs).logits
            through.set()
            assert torch.equal(other.result(), expected[0])
        assert torch.equal(found, expected[1])
        assert torch.equal(model(**batches[0].inputs).logits, expected[0])


def test_a_thread_that_came_second_keeps_its_mask_when_the_first_has_left():
    model = calibrated()
    batches = [tiny_batch(model, "llava", [row]) for row in ("itttt", "tttti")]
    watch = calibration_of(decoder_of(model, "llava")[0][0]).watch
    with torch.no_grad():
        expected = model(**batches[1].inputs).logits
        entered, left = threading.Event(), threading.Event()

        def wait(*_):
            entered.set()
            assert left.wait(60)

        watch._enter(model, (), {})  # this thread is in a pass; the other one enters and outlasts it
        hook = decoder_of(model, "llava")[0][0].mlp.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(torch.no_grad()(lambda: model(**batches[1].inputs).logits))
            assert entered.wait(60)
            watch._leave(model, (), None)
            left.set()
            assert torch.equal(other.result(), expected)
        hook.remove()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_what_a_hook_from_before_moca_kept_is_not_overwritten(fused, recorded):
    model = tiny_model("llava", dtype=torch.float32)
    kept = []
    hook = decoder_of(model, "llava")[0][0].register_forward_hook(lambda _, __, out: kept.append((out, out.clone())))
    add_moca(model, std=0.3, fused=fused)
    batch = tiny_batch(model, "llava", ROWS)
    if recorded:
        (loss_of(model, batch) + kept[0][0].square().mean()).backward()  # square saves the state for its gradient
    else:
        with torch.no_grad():
            model(**batch.inputs)
    assert all(torch.equal(state, copied) for state, copied in kept)
    hook.remove()
