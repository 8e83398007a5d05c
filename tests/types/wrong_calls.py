# ruff: noqa: B018
"""Calls that type checkers reject, each on a line that ends in `# wrong`. Read by test_types.py, never run."""

import torch
from torch import Tensor, nn

import mir_kernels
import modality_integration
from mir_kernels import StreamingMoments, frechet_distance, sqrtm, trace_sqrt_product
from modality_integration import MIRCallback, ModalityIntegrationRate, add_moca, capture, mir, official

x = torch.ones(4, 4)
model = nn.Linear(4, 4)
flag = bool(x.any())

mir(1, 2, nonsense=3)  # wrong
mir([x], [x], outliers="drop")  # wrong
mir([x], [x], sqrt_precision="double")  # wrong
mir([x], [x], "remove")  # wrong
number: int = mir([x], [x])  # wrong
mir([x], [x]).nonsense  # wrong
ModalityIntegrationRate(hold="all")  # wrong
ModalityIntegrationRate(precision="half")  # wrong
ModalityIntegrationRate().update([x], x)  # wrong
modality_integration.compar  # wrong
modality_integration.nothing()  # wrong
add_moca(model, std="0.02")  # wrong
add_moca(model, dtype="bfloat16")  # wrong
capture(model, last="final")  # wrong
MIRCallback([{"input_ids": x}], every="100")  # wrong
official.calculate_fid(x)  # wrong
mir_kernels.moca(x, x, x)  # wrong
mir_kernels.sqrt(x)  # wrong
sqrtm(x, method="schulz")  # wrong
sqrtm(x, precision="float8")  # wrong
StreamingMoments("8")  # wrong
StreamingMoments(8, precision="half")  # wrong
value: Tensor = trace_sqrt_product(x, x, bounds=True)  # wrong
trace_sqrt_product(x, x).lower  # wrong
frechet_distance(x, x, x)  # wrong
frechet_distance(x, x, x, x, precision="float16")  # wrong
frechet_distance(x, x, x, x, bounds="yes")  # wrong
frechet_distance(x, x, x, x, backend="native")  # wrong
distance: Tensor = frechet_distance(x, x, x, x, bounds=True)  # wrong
frechet_distance(x, x, x, x).upper  # wrong
either: Tensor = mir_kernels.trace_sqrt_from_features(x, x, bounds=flag)  # wrong
mir_kernels.frechet_distance_from_features(x, x, bounds=True).middle  # wrong
mir_kernels.frechet_distance_from_features(x, x, backend="cuda")  # wrong
mir_kernels.moca(x, x, x, x, backend="gpu")  # wrong
mir_kernels.moca(x, x, x, [True, False])  # wrong
mir_kernels.token_norms(x, backend="linalg")  # wrong
mir_kernels.newton_schulz(x, iterations=3, backend="triton")  # wrong
StreamingMoments(8, backend="cuda")  # wrong
mir([x], [x], backend="gpu")  # wrong
mir([x], [x], sinks="drop")  # wrong
ModalityIntegrationRate(sinks="drop")  # wrong
ModalityIntegrationRate(backend="gpu")  # wrong
mir([x], [x]).plot("a.png", title="layers")  # wrong
figure, axes = mir([x], [x]).plot("a.png")  # wrong
mir_kernels._native.C.moca_forward(x)  # wrong
