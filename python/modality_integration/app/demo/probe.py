"""MIR of the demo's model on held-out pictures with unrelated prose."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from modality_integration.app.demo.pictures import KINDS, Pictures
from modality_integration.app.options import TokenOptions
from modality_integration.app.samples import Sample, Samples, Text, groups_of, open_image, pair
from modality_integration.app.stream import finish, stream
from modality_integration.metric.files import write_text
from modality_integration.metric.result import MIRResult
from modality_integration.metric.streaming import ModalityIntegrationRate

TEXT_TOKENS = 64  # tokens of prose in every measured sample
GROUPS = 5  # groups of samples for the standard error


def probe_samples(
    pictures: Pictures,
    count: int,
    seed: int,
    kinds: Sequence[str] = KINDS,
    prose: Sequence[Text] | None = None,
    *,
    groups: int = GROUPS,
    in_turn: bool = False,
) -> Samples:
    """Pair `count` held-out pictures of `kinds` with unrelated prose, by default from Python's language reference.

    groups, in_turn: groups of samples, as in `pair`. If prose, a photograph, an emoji, a scene or a digit is used more
    than once, it still occurs in only one group.
    """
    pictured = pictures.held_out(count, kinds)[:]
    texts = language_reference() if prose is None else prose
    keys = [(item.kind, item.source) for item in pictured], range(len(texts))
    return pair([item.image for item in pictured], texts, count, seed, groups, in_turn=in_turn, keys=keys)


def language_reference() -> list[Text]:
    """Prose that every Python installation has: the long topics of the language reference."""
    topics = pydoc_data.topics.topics
    return [Text(name, " ".join(topics[name].split())) for name in sorted(topics) if len(topics[name]) > 600]


def measure(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    groups: int = GROUPS,
    text_tokens: int = TEXT_TOKENS,
    template: Literal["auto", "chat", "plain"] = "chat",
    bounds: bool = False,
    after_sample: Callable[[int], None] = lambda count: None,
) -> MIRResult:
    """MIR of the model in its current state, with a standard error from `groups` groups of samples that share nothing.

    bounds: also compute certified bounds of the arithmetic.
    """
    held = groups_of(samples, groups)
    metric = ModalityIntegrationRate(bounds=bounds, groups=held, samples=len(samples))
    tokens = TokenOptions(text_tokens=text_tokens, template=template)
    stream(model, processor, samples, metric, tokens, after_sample=after_sample)
    result = finish(metric)
    if groups and not held:
        result.notes.append(
            f"no standard error: {groups} groups of {len(samples)} samples would share pictures or prose; use fewer "
            "samples"
        )
    metric.reset()  # torchmetrics objects refer to themselves and would keep the covariances until a garbage collection
    return result


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Write images/ and prose.jsonl to `folder`, as input for `mir compute`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index, sample in enumerate(samples):
        open_image(sample.image).save(folder / "images" / f"{index:03d}.png")
    lines = [json.dumps({"text": sample.text.content}) + "\n" for sample in samples]
    write_text(folder / "prose.jsonl", "".join(lines))
