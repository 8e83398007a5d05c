"""The recipes of docs/models.md, each on a stand-in that marks vision tokens as a model outside transformers does."""

import pytest
import torch
from torch import nn

from modality_integration.models.capture import capture
from modality_integration.models.token_roles import expanded_placeholders

HIDDEN, VOCAB, DEPTH = 16, 40, 3
IMAGE = -200  # placeholder id of the original LLaVA
PATCHES = 6


class Layer(nn.Module):
    """A residual layer that mixes tokens, so that an extra or missing token changes all later ones."""

    def __init__(self):
        super().__init__()
        self.mix, self.up = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states):
        length = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        hidden_states = hidden_states + self.mix(hidden_states.cumsum(1) / length)
        return (hidden_states + self.up(hidden_states).tanh(),)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, inputs_embeds, attention_mask=None, modality_indicators=None, image_rows=None):
        for layer in self.layers:
            (inputs_embeds,) = layer(inputs_embeds)
            if image_rows is not None:  # Cambrian rewrites vision tokens between layers, in place
                inputs_embeds[image_rows] = inputs_embeds[image_rows].tanh()
        return self.norm(inputs_embeds)


class Expanding(nn.Module):
    """As in the original LLaVA: drops padding, replaces -200 by features, pads again, calls the decoder."""

    def __init__(self, padding="right", between=False):
        super().__init__()
        self.model, self.embed = Decoder(), nn.Embedding(VOCAB, HIDDEN)
        self.padding, self.between = padding, between

    def forward(self, input_ids, attention_mask, images):
        images, rows, marks = iter(images), [], []
        for ids, kept in zip(input_ids, attention_mask, strict=True):
            parts = [next(images) if i == IMAGE else self.embed(i)[None] for i in ids[kept.bool()]]
            flags = [torch.full((len(p),), int(i == IMAGE)) for p, i in zip(parts, ids[kept.bool()], strict=True)]
            rows.append(torch.cat(parts))
            marks.append(torch.cat(flags))
        longest, embeds, mask, vision = max(map(len, rows)), [], [], []
        for row, flags in zip(rows, marks, strict=True):
            gap = longest - len(row)
            sides = (gap, 0) if self.padding == "left" else (0, gap)
            embeds.append(nn.functional.pad(row, (0, 0, *sides)))
            mask.append(nn.functional.pad(torch.ones(len(row), dtype=torch.long), sides))
            vision.append(nn.functional.pad(flags, sides))
        vision = torch.stack(vision)
        self.truth = vision.bool(), torch.stack(mask).bool(), torch.stack(embeds)
        named = {"image_rows": vision.bool()} if self.between else {}
        return self.model(inputs_embeds=torch.stack(embeds), attention_mask=torch.stack(mask), **named)


class Indicating(nn.Module):
    """As in mPLUG-Owl2: padding stays in place, the padding mask grows on the left, and the decoder gets a mask."""

    def __init__(self):
        super().__init__()
        self.model, self.embed = Decoder(), nn.Embedding(VOCAB, HIDDEN)

    def forward(self, input_ids, attention_mask, images):
        images, rows, marks = iter(images), [], []
        for ids in input_ids:
            rows.append(torch.cat([next(images) if i == IMAGE else self.embed(i)[None] for i in ids]))
            marks.append((ids == IMAGE).repeat_interleave(torch.where(ids == IMAGE, PATCHES, 1)).long())
        grown = [
            nn.functional.pad(m, (len(row) - len(m), 0), value=1) for m, row in zip(attention_mask, rows, strict=True)
        ]
        embeds, vision, kept = (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (rows, marks, grown))
        self.truth = vision.bool(), embeds
        return self.model(inputs_embeds=embeds, attention_mask=kept, modality_indicators=vision)


class Marked(nn.Module):
    """As in CogVLM: input_ids hold one token per feature, and an argument marks these tokens."""

    def __init__(self):
        super().__init__()
        self.model, self.embed = Decoder(), nn.Embedding(VOCAB, HIDDEN)

    def forward(self, input_ids, token_type_ids=None, attention_mask=None):
        return self.model(self.embed(input_ids), attention_mask=attention_mask)


class LanguageModel(nn.Module):
    """DeepSeek-VL's inner model: the caller embeds, and the marker is not passed to the forward."""

    def __init__(self):
        super().__init__()
        self.model = Decoder()

    def forward(self, inputs_embeds, attention_mask):
        return self.model(inputs_embeds, attention_mask=attention_mask)


def plain_loop(decoder, embeds, vision=None):
    """The output of each layer, the last one after the norm."""
    states = []
    for layer in decoder.layers:
        (embeds,) = layer(embeds)
        if vision is not None:
            embeds = torch.where(vision[..., None], embeds.tanh(), embeds)
        states.append(embeds)
    return [*states[:-1], decoder.norm(states[-1])]


def after_vision(vision, kept):
    """The kept tokens after the last vision token, row by row."""
    text = torch.zeros_like(vision)
    for row in range(len(vision)):
        last = int(vision[row].nonzero().max())
        text[row, last + 1 :] = kept[row, last + 1 :]
    return text


def check(seen, states, vision, kept):
    assert all(torch.equal(got, want) for got, want in zip(seen.hidden_states, states, strict=True))
    assert torch.equal(seen.vision_mask, vision)
    assert torch.equal(seen.text_mask, after_vision(vision, kept))


def placeholders(padding):
    """Two rows of different lengths, with two images in the second; the shorter row is padded with a wrong id."""
    rows = [[1, 4, IMAGE, 5, 6, 7], [1, IMAGE, 8, 9, IMAGE, 10, 11, 12, 13]]
    wide = max(map(len, rows))
    ids, mask = torch.zeros(2, wide, dtype=torch.long), torch.zeros(2, wide, dtype=torch.long)
    for row, values in enumerate(rows):
        at = slice(wide - len(values), wide) if padding == "left" else slice(0, len(values))
        ids[row, at], mask[row, at] = torch.tensor(values), 1
    return ids, mask


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        ("LLaVA, ShareGPT4V", PATCHES),
        ("Mini-Gemini with image grids", [PATCHES, 5 * PATCHES, 2 * PATCHES]),
        ("Cambrian: h rows of w features and a newline", 2 * (3 + 1)),
    ],
)
def test_an_expanded_placeholder_is_captured_at_the_decoder(family, lengths, padding):
    torch.manual_seed(0)
    between = family.startswith("Cambrian")
    model = Expanding(padding, between=between)
    ids, mask = placeholders(padding)
    sizes = [lengths] * 3 if isinstance(lengths, int) else lengths
    images = [torch.randn(n, HIDDEN) for n in sizes]
    expected = expanded_placeholders(ids, IMAGE, lengths, attention_mask=mask, padding=padding)
    with torch.no_grad(), capture(model.model, layers="layers", vision_mask=expected) as seen:
        model(ids, mask, images)
        vision, kept, embeds = model.truth
        check(seen, plain_loop(model.model, embeds, vision if between else None), vision, kept)


def test_mplug_owl2_names_its_own_mask_at_the_decoder():
    torch.manual_seed(1)
    model = Indicating()
    ids, mask = placeholders("right")
    real = mask.sum(1) + (ids == IMAGE).sum(1) * (PATCHES - 1)  # a row's length without padding
    with torch.no_grad(), capture(model.model, layers="layers", vision_mask="modality_indicators") as seen:
        model(ids, mask, [torch.randn(PATCHES, HIDDEN) for _ in range(3)])
        vision, embeds = model.truth
        kept = torch.arange(vision.shape[1]) < real[:, None]
        check(seen, plain_loop(model.model, embeds), vision, kept)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_cogvlm_names_its_token_type_ids(padding):
    torch.manual_seed(2)
    model, ids = Marked(), torch.randint(VOCAB, (2, 12))
    types, kept = torch.zeros_like(ids), torch.ones_like(ids)
    types[:, 3:7] = 1
    kept[1, -2:] = 0
    if padding == "left":
        types, kept = types.flip(1), kept.flip(1)
    with torch.no_grad(), capture(model, layers="model.layers", vision_mask="token_type_ids") as seen:
        model(ids, token_type_ids=types, attention_mask=kept)
        check(seen, plain_loop(model.model, model.embed(ids)), types.bool(), kept.bool())


def test_deepseek_vl_takes_its_processors_mask_at_the_language_model():
    torch.manual_seed(3)
    language_model, embeds = LanguageModel(), torch.randn(2, 11, HIDDEN)
    images_seq_mask, kept = torch.zeros(2, 11, dtype=torch.bool), torch.ones(2, 11, dtype=torch.long)
    images_seq_mask[0, 4:8] = images_seq_mask[1, 5:9] = True
    kept[0, :3] = 0  # its processor pads on the left
    with torch.no_grad(), capture(language_model, layers="model.layers", vision_mask=images_seq_mask) as seen:
        language_model(inputs_embeds=embeds, attention_mask=kept)
        check(seen, plain_loop(language_model.model, embeds), images_seq_mask, kept.bool())


def test_a_wrong_length_is_refused_with_both_shapes():
    model = Expanding()
    ids, mask = placeholders("right")
    wrong = expanded_placeholders(ids, IMAGE, PATCHES + 1, attention_mask=mask)
    with torch.no_grad(), capture(model.model, vision_mask=wrong) as seen:
        model(ids, mask, [torch.randn(PATCHES, HIDDEN) for _ in range(3)])
    with pytest.raises(ValueError, match=r"vision_mask: .*shape \(2, 19\), got shape \(2, 21\)"):
        _ = seen.vision_mask


def test_ids_without_padding_or_placeholder_expand_as_they_stand():
    ids = torch.tensor([[1, 2, IMAGE], [3, 4, 5]])
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(expanded_placeholders(ids, IMAGE, [2]), expected)
    assert torch.equal(expanded_placeholders(ids, IMAGE, 0), torch.zeros(2, 3, dtype=torch.bool))
    assert expanded_placeholders(ids.clamp(min=0), IMAGE, []).shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [2]}, r"lengths: .*each of 2 placeholders -200, got \[2\]"),
        ({"lengths": -1}, "lengths: expected a number >= 0"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids: expected shape \(B, T\), got \(3,\)"),
        ({"attention_mask": torch.ones(2, 2)}, r"attention_mask: expected shape \(2, 3\), got \(2, 2\)"),
        ({"padding": "both"}, "padding: expected one of"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {"input_ids": torch.full((2, 3), IMAGE), "placeholder": IMAGE, "lengths": 4} | change
    if "input_ids" not in change:
        arguments["input_ids"][:, 1:] = 1
    with pytest.raises(ValueError, match=message):
        expanded_placeholders(**arguments)
