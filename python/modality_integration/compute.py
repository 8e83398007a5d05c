"""`mir compute`: MIR of a saved model on images and prose, a sample at a time, resumable, over several processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from mir_kernels.moments.streaming import ROWS
from modality_integration import data, loading
from modality_integration.checkpoint import Checkpoint, Passage, write_json
from modality_integration.data import InputError, Sample, refusals
from modality_integration.decoder import parameter_device
from modality_integration.doctor import free_memory
from modality_integration.layer_stream import HOLD
from modality_integration.metric import ModalityIntegrationRate
from modality_integration.probe import lean_forward
from modality_integration.residual_stream import capture
from modality_integration.result import MIRResult, with_error
from modality_integration.states import mir_of_states

FIRST_CHECKPOINT = 10.0  # seconds


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal; the message says what is kept and how to go on."""

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Options:
    """The arguments of `mir compute`; device and what follows it do not decide the value.

    text_tokens: None takes prose whole. in_order: files as sorted by name, not a random choice. checkpoint_every: in
    samples; None goes by the clock.
    """

    model: str
    images: Path
    text: Path
    samples: int = 100
    seed: int = 0
    text_tokens: int | None = 512
    template: str = "auto"
    dtype: str = "auto"
    last: str = "normed"
    text_role: str = "after"
    outliers: str = "remove"
    normalize: bool = True
    bounds: bool = True
    precision: str = "auto"
    in_order: bool = False
    device: str = "auto"
    device_map: str | None = None
    out: Path = Path("mir-out")
    checkpoint_every: int | None = None
    second_pass: bool = False
    restart: bool = False
    groups: int = 5


def run(options: Options, console: Console) -> MIRResult:
    """MIR of `options.model`; writes mir.json, layers.png and run.json below `options.out` and prints a table.

    Raises InputError for what a person can mend, Interrupted after Ctrl-C or SIGTERM with the state saved.
    """
    device = loading.pick_device(options.device)
    with _processes(device) as (rank, world):
        console.quiet = console.quiet or rank > 0
        require_folder(options.out)
        metric = metric_of(options).to(device)
        samples, notes, skipped = choose(options, console)

        arguments = {**_deciding(options, device, world), "chosen_samples": _digest(samples)}
        checkpoint = Checkpoint(options.out / "checkpoint", arguments, rank)
        if options.restart:
            checkpoint.clear()
        passage = _agreed(checkpoint.passage(), world)

        began = time.monotonic()
        model, processor, about = load(options, device, console)
        if memory := _scarce(model, options.groups, device):
            console.print(f"[yellow]note[/] {memory}", highlight=False)
        options.out.mkdir(parents=True, exist_ok=True)
        mine = samples[rank::world]
        if passage.done:
            checkpoint.load(metric)
            console.print(f"going on after {passage.done} of {len(mine)} samples", highlight=False)

        while True:
            _pass(model, processor, mine, metric, passage, checkpoint, options, console)
            with console.status("square roots, layer by layer"):
                result = finish(metric)
            if passage.number == 2 or not options.second_pass or not result.total_missed:
                break
            with metric.sync_context():  # the limits are those of all processes' tokens
                metric = metric.second_pass()
            passage = Passage(2, 0)

        result.notes.extend(about + notes)
        result.settings = settings_of(options, arguments, model)
        if rank == 0:
            _write(result, options, arguments, skipped, time.monotonic() - began)
            _show(result, options.out, console)
        checkpoint.clear()
        return result


def load(options: Options, device: torch.device, console: Console) -> loading.Loaded:
    """The model that `options` name, with a word on the way."""
    with console.status(f"loading {options.model}"):
        return loading.load(
            options.model, device, options.dtype, device_map=options.device_map, template=options.template
        )


def settings_of(options: Options, arguments: dict[str, Any], model: Any) -> dict[str, Any]:
    """What the value was measured with, for `MIRResult.settings`."""
    names = ("model", "samples", "seed", "in_order", "text_tokens", "template", "last", "text_role", "precision")
    return {
        **{name: getattr(options, name) for name in names},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **{name: arguments[name] for name in ("groups", "processes", "chosen_samples")},
    }


def run_states(
    files: Sequence[Path],
    out: Path,
    device: str,
    outliers: str,
    normalize: bool,
    bounds: bool,
    console: Console,
    groups: int = 0,
) -> MIRResult:
    """MIR of saved hidden states (see `states`), a folder meaning its .safetensors files; reported as by `run`."""
    paths: list[Path] = []
    for path in files:
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found or not found[0].exists():
            raise InputError(f"{path} holds no .safetensors file" if path.is_dir() else f"{path} does not exist")
        paths += found
    require_folder(out)
    with progress_bar(console) as bar, refusals(""):
        task = bar.add_task(f"MIR of {len(paths)} file{'s' * (len(paths) > 1)}, layer by layer", total=None)
        result = mir_of_states(
            paths,
            outliers=outliers,
            normalize=normalize,
            bounds=bounds,
            groups=groups,
            device=loading.pick_device(device),
            progress=lambda layer, layers: bar.update(task, completed=layer - 1, total=layers),
        )
        bar.update(task, completed=len(result.terms))
    out.mkdir(parents=True, exist_ok=True)
    result.to_json(out / "mir.json")
    result.plot(out / "layers.png")
    _show(result, out, console)
    return result


def choose(options: Options, console: Console) -> tuple[list[Sample], list[str], list[tuple[str, str]]]:
    """The pairs that `options` choose, notes on them for the result, and what is broken as (name, reason), printed."""
    seed = None if options.in_order else options.seed
    images = data.choose_images(options.images, options.samples, seed)
    texts = data.choose_texts(options.text, options.samples, seed)
    for line in [*_skipped(images.skipped, "image"), *_skipped(texts.skipped, "text")]:
        console.print(f"[yellow]note[/] {line}", highlight=False)
    samples = data.pair(images.items, texts.items, options.samples, seed)
    return samples, _notes(images, texts, options.samples), images.skipped + texts.skipped


def require_folder(out: Path) -> None:
    """InputError unless `out` is a folder that can be written to, or can become one."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"out: {there} is a file, and the results go into a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"out: {there} cannot be written to")


def stream(
    model: torch.nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    metric: ModalityIntegrationRate,
    *,
    text_tokens: int | None = 512,
    template: str = "auto",
    last: str = "normed",
    text: str = "after",
    start: int = 0,
    after_sample: Callable[[int], None] = lambda count: None,
) -> None:
    """Forward `samples[start:]` one at a time and feed the hidden states of every layer to `metric`.

    `after_sample(count)` is called with the number of samples counted so far; the metric then holds exactly those.
    """
    device, dtype, forward = parameter_device(model), next(model.parameters()).dtype, lean_forward(model)
    tokens: dict[str, Any] = {"last": last, "text": text}
    name = "the first sample"
    try:
        with torch.inference_mode(), refusals("model"), capture(model, **tokens) as captured:
            for index in range(start, len(samples)):
                sample = samples[index]
                name = f"sample {index + 1} of {len(samples)} ({_name(sample.image)} with {sample.text.name})"
                prose = data.truncate(sample.text.content, processor.tokenizer, text_tokens)
                with refusals(name):
                    inputs = loading.encode(processor, data.open_image(sample.image), prose, template)
                model(**{k: _place(v, device, dtype) for k, v in inputs.items()}, **forward)
                with refusals(name):
                    metric.update(captured.hidden_states, captured.vision_mask, captured.text_mask)
                after_sample(index + 1)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(device, name, text_tokens) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):  # torch's CPU allocator
            raise _out_of_memory(device, name, text_tokens) from error
        raise


def metric_of(options: Any) -> ModalityIntegrationRate:
    """A fresh metric as `options` (or a study's subject) want it; InputError for what does not exist."""
    names = ("outliers", "normalize", "bounds", "precision", "groups")
    with refusals("options"):
        return ModalityIntegrationRate(**{name: getattr(options, name) for name in names})


def finish(metric: ModalityIntegrationRate) -> MIRResult:
    """The metric's result, what cannot be computed said as an InputError."""
    with refusals("MIR is not defined for these samples"):
        result = metric.compute()
    asked, got = metric.options.groups, len(result.left_out[0]) if result.left_out else 0
    if 0 < got < asked:
        result.notes.append(
            f"the standard error is of {got} groups of samples, {asked} were asked for: take more samples"
        )
    return result


def _pass(
    model: torch.nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    metric: ModalityIntegrationRate,
    passage: Passage,
    checkpoint: Checkpoint,
    options: Options,
    console: Console,
) -> None:
    """Stream the samples that `passage` has not counted yet, with a bar, checkpoints, and a clean way out."""
    with _Stop() as stop, progress_bar(console) as bar:
        task = bar.add_task(
            f"{Path(options.model).name}, pass {passage.number}", total=len(samples), completed=passage.done
        )

        due = _Due(options.checkpoint_every)

        def after_sample(count: int) -> None:
            bar.update(task, completed=count)
            if stop.signal or due(count):
                with due.writing():
                    checkpoint.save(metric, Passage(passage.number, count))
            if stop.signal:
                raise Interrupted(
                    f"interrupted after {count} of {len(samples)} samples; the same command goes on from there",
                    128 + stop.signal,
                )

        stream(
            model,
            processor,
            samples,
            metric,
            text_tokens=options.text_tokens,
            template=options.template,
            last=options.last,
            text=options.text_role,
            start=passage.done,
            after_sample=after_sample,
        )


def _place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


class _Due:
    """When a checkpoint is written: every `every` samples; or, with None, by the clock, so that writing takes no more
    than a twentieth of the time. At 7B a state is 20 GB and more.
    """

    def __init__(self, every: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._next = clock() + FIRST_CHECKPOINT

    def __call__(self, count: int) -> bool:
        return count % self._every == 0 if self._every else self._clock() >= self._next

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around a write, whose time tells when the next is due."""
        began = self._clock()
        yield
        ended = self._clock()
        self._next = ended + max(FIRST_CHECKPOINT, 20 * (ended - began))


@contextlib.contextmanager
def _processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, number of processes); joins the group that torchrun announces, and leaves it again."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    # Objects travel over gloo, from any device; NCCL would put them on the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def _agreed(passage: Passage, world: int) -> Passage:
    """Where to go on, every process in the same pass: a kill between two passes leaves some without their first one."""
    if world == 1:
        return passage
    passages: list[Any] = [None] * world
    dist.all_gather_object(passages, passage)
    return passage if len({other.number for other in passages}) == 1 else Passage()


class _Stop:
    """While entered, the first SIGINT or SIGTERM is only noted in `signal`; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signal:
            raise Interrupted("stopped at once; the same command goes on from the last checkpoint", 128 + number)
        self.signal = number


def progress_bar(console: Console) -> Progress:
    """A bar with a count and the time that remains."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _deciding(options: Options, device: torch.device, world: int) -> dict[str, Any]:
    """What the bits of the result depend on, by the names a person typed."""
    values = asdict(options)
    for name in ("out", "checkpoint_every", "device_map", "restart", "second_pass", "images", "text"):
        del values[name]  # the data count by `chosen_samples`, so a moved folder does not
    return values | {
        "device": device.type,
        "processes": world,
        "model_files": _model_digest(options.model),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def _digest(samples: Sequence[Sample]) -> str:
    """A short hash of the content of every pair, in order."""
    hashed = hashlib.sha256()
    for sample in samples:
        image = sample.image.read_bytes() if isinstance(sample.image, Path) else sample.image.tobytes()
        hashed.update(hashlib.sha256(image).digest() + hashlib.sha256(sample.text.content.encode()).digest())
    return hashed.hexdigest()[:16]


def _model_digest(name: str) -> str | None:
    """A short hash of a local model's file names, sizes and times, so that a retrained one is not resumed into."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _notes(images: data.Chosen, texts: data.Chosen, samples: int) -> list[str]:
    notes = []
    for chosen, what in ((images, "image"), (texts, "text")):
        if chosen.skipped:
            notes.append(f"skipped {len(chosen.skipped)} broken {what}{'s' * (len(chosen.skipped) > 1)}")
        if len(chosen.items) < samples:
            notes.append(f"{len(chosen.items)} usable {what}s for {samples} samples: some are used more than once")
    return notes


def _skipped(skipped: Sequence[tuple[str, str]], what: str, most: int = 5) -> list[str]:
    lines = [f"broken {what} {name}: {reason}" for name, reason in skipped[:most]]
    return lines + ([f"and {len(skipped) - most} more broken {what}s"] if len(skipped) > most else [])


def _out_of_memory(device: torch.device, name: str, text_tokens: int | None) -> InputError:
    return InputError(
        f"out of memory on {device} at {name}: lower --text-tokens (now {text_tokens or 'all'}) or --groups, load the "
        "weights smaller with --dtype bfloat16, or use --device cpu; with changed arguments add --restart"
    )


def _scarce(model: Any, groups: int, device: torch.device) -> str | None:
    """A note where the metric's state may outgrow the free memory.

    A layer and modality has held rows; and for each group an accumulator of d (d + 1) / 2 float64 numbers with rows
    gathered for it, made once more tokens came than are held.
    """
    config = model.config.get_text_config()
    d, layers, size = config.hidden_size, config.num_hidden_layers, next(model.parameters()).element_size()
    held = max(HOLD, d + 1) * d * size
    accumulator = 4 * d * (d + 1) + ROWS.get(device.type, max(ROWS.values())) * d * size
    needed, without = (2 * layers * (held + count * accumulator) / 1e9 for count in (max(groups, 1), 1))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if free is None or needed < free / 1e9:
        return None
    return f"the covariances of every layer may take {needed:.1f} GB, and {free / 1e9:.1f} GB are free on {device}" + (
        f": --groups 0 takes {without:.1f} GB" if groups else ""
    )


def _name(image: Any) -> str:
    return image.name if isinstance(image, Path) else "a picture in memory"


def _write(result: MIRResult, options: Options, arguments: dict, skipped: list, seconds: float) -> None:
    result.to_json(options.out / "mir.json")
    result.plot(options.out / "layers.png")
    write_json(
        options.out / "run.json",
        {
            "mir": result.value,
            "error": result.error,
            "images": str(options.images),
            "text": str(options.text),
            "arguments": arguments,
            "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
            "seconds": round(seconds, 3),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "torchmetrics")},
            },
        },
    )


def _show(result: MIRResult, out: Path, console: Console) -> None:
    console.print(result.table())
    for note in result.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)
    interval = "" if result.lower is None else f"   (proved: {result.lower:.6f} to {result.upper:.6f})"
    console.print(f"[bold]MIR {with_error(result.value, result.error)}[/]{interval}", highlight=False)
    console.print(f"wrote mir.json and layers.png in {out}", highlight=False)
