"""The compiled module. Arguments are addresses (`Tensor.data_ptr()`), strides in elements, sizes and `DTYPES` codes.

Call it through the `native` modules of the operations, which check their arguments. tests/native/test_stub.py compares
this file with the module. The last two functions exist only in builds with nvcc.
"""

VERSION: str
CPU_ISA: str
CPU_ISAS: tuple[str, ...]
CUDA_ARCHS: tuple[int, ...]
OPENMP: bool
DTYPES: dict[str, int]
NOT_MIRRORED: int
STANDARD_FORM_BLOCK: int
BAND_WIDTH: int

def moca_partial_rows(rows: int, /) -> int: ...
def moca_forward(
    x: int,
    x_stride: int,
    scale: int,
    shift: int,
    mask: int,
    out: int,
    out_stride: int,
    rows: int,
    cols: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def moca_backward(
    grad: int,
    grad_stride: int,
    x: int,
    x_stride: int,
    x_rows: int,
    scale: int,
    mask: int,
    dx: int,
    dx_stride: int,
    partial: int,
    dscale: int,
    dshift: int,
    rows: int,
    cols: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def add_rms_forward(
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    scale: int,
    shift: int,
    mask: int,
    weight: int,
    eps: float,
    out: int,
    out_stride: int,
    h: int,
    h_stride: int,
    rstd: int,
    rows: int,
    cols: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def add_rms_backward(
    grad_out: int,
    grad_out_stride: int,
    grad_h: int,
    grad_h_stride: int,
    h: int,
    h_stride: int,
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    scale: int,
    mask: int,
    weight: int,
    rstd: int,
    dx: int,
    dx_stride: int,
    partial: int,
    dscale: int,
    dshift: int,
    dweight: int,
    rows: int,
    cols: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def token_norms(
    x: int,
    x_stride: int,
    out: int,
    rows: int,
    cols: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def second_moment(
    x: int,
    x_stride: int,
    shift: int,
    vectors: int,
    weights: int,
    second: int,
    panel: int,
    sums: int,
    packed: int,
    rows: int,
    cols: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def second_moment_workspace(rows: int, cols: int, /) -> int: ...
def symmetry(x: int, workspace: int, count: int, d: int, allowed: float, dtype: int, threads: int, /) -> int: ...
def symmetry_workspace(count: int, d: int, /) -> int: ...
def symmetrize(x: int, out: int, count: int, d: int, dtype: int, threads: int, /) -> None: ...
def standard_form(
    a: int,
    b: int,
    form: int,
    rounding: int,
    exponent: int,
    workspace: int,
    count: int,
    d: int,
    rows: int,
    stride: int,
    threads: int,
    /,
) -> None: ...
def checked_standard_form(
    a: int,
    b: int,
    form: int,
    rounding: int,
    exponent: int,
    workspace: int,
    count: int,
    d: int,
    rows: int,
    allowed_a: float,
    allowed_b: float,
    dtype_a: int,
    dtype_b: int,
    threads: int,
    /,
) -> int: ...
def checked_standard_form_workspace(count: int, d: int, rows: int, threads: int, /) -> int: ...
def standard_form_workspace(count: int, rows: int, threads: int, /) -> int: ...
def shifted_factors(
    form: int,
    shifts: int,
    pivots: int,
    norms: int,
    workspace: int,
    count: int,
    d: int,
    stride: int,
    threads: int,
    /,
) -> None: ...
def shifted_factors_workspace(d: int, /) -> int: ...
def roundings(d: int, /) -> int: ...
def band_reduction(form: int, band: int, workspace: int, d: int, stride: int, threads: int, /) -> None: ...
def band_reduction_workspace(d: int, threads: int, /) -> int: ...
def band_inverse_traces(
    band: int,
    shifts: int,
    traces: int,
    workspace: int,
    rows: int,
    width: int,
    count: int,
    threads: int,
    /,
) -> None: ...
def band_inverse_traces_workspace(width: int, count: int, /) -> int: ...
def moca_forward_cuda(
    x: int,
    x_stride: int,
    scale: int,
    shift: int,
    mask: int,
    out: int,
    out_stride: int,
    rows: int,
    cols: int,
    dtype: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def moca_backward_cuda(
    grad: int,
    grad_stride: int,
    x: int,
    x_stride: int,
    x_rows: int,
    scale: int,
    mask: int,
    dx: int,
    dx_stride: int,
    partial: int,
    dscale: int,
    dshift: int,
    rows: int,
    cols: int,
    dtype: int,
    device: int,
    stream: int,
    /,
) -> None: ...
