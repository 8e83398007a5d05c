"""Calls that type checkers accept. `assert_type` checks the result types. Read by test_types.py, never run."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import mir_kernels
import modality_integration
from mir_kernels import (
    FrechetDistance,
    MoCa,
    NewtonSchulz,
    StreamingMoments,
    TraceSqrt,
    frechet_distance,
    frechet_distance_from_features,
    trace_sqrt_from_features,
    trace_sqrt_product,
)
from modality_integration import (
    Capture,
    Comparison,
    Comparisons,
    LayerTerms,
    MIRCallback,
    MIRResult,
    MIRTensor,
    MoCaReport,
    MoCaSite,
    ModalityIntegrationRate,
    Watch,
    add_moca,
    capture,
    compare,
    compare_several,
    expanded_placeholders,
    jackknife,
    lightning_callback,
    load_moca,
    measure_mir,
    mir,
    mir_of_states,
    moca_parameters,
    official,
    paired_error,
    remove_moca,
    save_moca,
    save_states,
    vision_tokens,
)


def kernels(x: Tensor, mask: Tensor, flag: bool) -> None:
    vector = torch.ones(8)
    assert_type(mir_kernels.moca(x, vector, vector, mask, inplace=True), Tensor)
    out, h = mir_kernels.add_moca_rms_norm(x, x, vector, vector, mask, vector, eps=1e-5)
    assert_type(out, Tensor)
    assert_type(h, Tensor)
    MoCa(8, std=0.02)(x, mask)
    assert_type(mir_kernels.token_norms(x), Tensor)
    moments = StreamingMoments(8, precision="exact")
    moments.update(x, mask)
    assert_type(moments.count, int)
    assert_type(moments.covariance(ddof=1), Tensor)
    assert_type(mir_kernels.sqrtm(x, method="polar", precision="float16"), Tensor)
    assert_type(mir_kernels.newton_schulz(x, iterations=5), NewtonSchulz)
    assert_type(trace_sqrt_product(x, x), Tensor)
    assert_type(trace_sqrt_product(x, x, bounds=True, precision="float64"), TraceSqrt)
    assert_type(frechet_distance(x, x, x, x), Tensor)
    assert_type(frechet_distance(x, x, x, x, bounds=True), FrechetDistance)
    either = trace_sqrt_product(x, x, bounds=flag)
    if isinstance(either, TraceSqrt):
        assert_type(either.lower, Tensor)
    distance = frechet_distance(x, x, x, x, bounds=flag, backend="linalg")
    if isinstance(distance, FrechetDistance):
        assert_type(distance.upper, Tensor)
    assert_type(trace_sqrt_from_features(x, x), Tensor)
    assert_type(trace_sqrt_from_features(x, x, bounds=True), TraceSqrt)
    assert_type(trace_sqrt_from_features(x, x, bounds=flag), Tensor | TraceSqrt)
    assert_type(frechet_distance_from_features(x, x, precision="bfloat16"), Tensor)
    assert_type(frechet_distance_from_features(x, x, bounds=True, backend="eager"), FrechetDistance)
    assert_type(frechet_distance_from_features(x, x, bounds=flag), Tensor | FrechetDistance)
    print(mir_kernels.backends())


def arrays(x: npt.NDArray[np.float32], mask: npt.NDArray[np.int64], tensor: Tensor) -> None:
    vector = np.ones(8)
    assert_type(mir_kernels.moca(x, vector, vector, mask), Tensor)
    assert_type(mir_kernels.moca(tensor, vector, tensor[0], mask, backend="native"), Tensor)
    MoCa(8)(x, mask)
    assert_type(mir_kernels.token_norms(x, backend="triton"), Tensor)
    StreamingMoments(8, backend="native").update(x, mask)
    assert_type(mir_kernels.sqrtm(x, backend="eager"), Tensor)
    assert_type(frechet_distance(vector, x, tensor[0], tensor, bounds=True), FrechetDistance)
    assert_type(mir([x], [tensor], backend="eager"), MIRResult)
    ModalityIntegrationRate(backend="native").update([x], mask, mask)
    save_states("a.safetensors", [x], mask, mask)
    assert_type(official.calculate_fid(x, tensor), float)


def number(result: MIRResult, results: list[MIRResult]) -> None:
    assert_type(float(result), float)
    assert_type(int(result), int)
    assert_type(f"{result:.3f}", str)
    assert_type(result < 3.4, bool)
    assert_type(min(results), MIRResult)
    assert_type(sorted(results), list[MIRResult])
    gap: float = result - results[0]
    rounded: float = round(result, 3)
    size: float = abs(result)
    total: float = 1 + 2 * result / 3 - (-result) ** 2
    print(gap, rounded, size, total, math.isclose(result, 3.374), math.fsum(results), np.asarray(results, dtype=float))
    assert_type(result.plot("layers.png"), Path)
    figure, axes = result.plot()
    axes.set_title(f"{figure.get_figwidth()} inches")
    result.plot(ax=axes)


def metric(vision: list[Tensor], text: list[Tensor], mask: Tensor) -> None:
    result = mir(vision, text, outliers="median", normalize=False, bounds=True, sqrt_precision="float64")
    assert_type(result, MIRResult)
    assert_type(result.value, float)
    assert_type(result.lower, "float | None")
    assert_type(result.terms, list[LayerTerms])
    assert_type(result.to_json("mir.json"), str)
    assert_type(MIRResult.from_json("mir.json"), MIRResult)
    running = ModalityIntegrationRate(groups=5, precision="exact", sync_on_compute=False)
    running.update(vision, mask, mask)
    assert_type(running.load("state.safetensors"), ModalityIntegrationRate)
    assert_type(running.compute(), MIRTensor)
    as_both: tuple[MIRResult, Tensor] = (running.compute(), running.compute())
    print(as_both)
    assert_type(compare_several({"before": result, "after": result}), Comparisons)
    both = compare(result, result, paired=True)
    assert_type(both, Comparison)
    assert_type(both.z, "float | None")
    assert_type(paired_error(result, result), "float | None")
    assert_type(jackknife([1.0, 2.0]), float)
    save_states("a.safetensors", vision, mask, mask)
    assert_type(mir_of_states(["a.safetensors"], outliers="none"), MIRResult)
    assert_type(official.calculate_fid(vision[0], text[0]), float)


def models(model: nn.Module, mask: Tensor, batches: list[dict[str, Tensor]]) -> None:
    with torch.no_grad(), capture(model, last="raw", text="all") as seen:
        assert_type(seen, Capture)
        assert_type(seen.hidden_states, list[Tensor])
    report = add_moca(model, std=0.02)
    assert_type(report, MoCaReport)
    assert_type(report.sites, tuple[MoCaSite, ...])
    assert_type(moca_parameters(model), list[nn.Parameter])
    with vision_tokens(model, mask):
        model(mask)
    save_moca(model, "moca.safetensors")
    load_moca(model, "moca.safetensors")
    remove_moca(model)
    assert_type(expanded_placeholders(mask, -200, 576), Tensor)
    assert_type(measure_mir(model, batches, metric={"groups": 0}), MIRResult)
    watch: Watch = MIRCallback(batches, every=100, patience=5)
    print(watch.history, lightning_callback(batches, module="model"), modality_integration.__all__)
