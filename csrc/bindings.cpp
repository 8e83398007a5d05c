// The Python module mir_kernels._C. Functions accept addresses, sizes and a stream, and write their results to memory.
// This is the only file that uses pybind11.
//
// Only arguments that would be undefined behaviour for any address are checked here. The Python callers in
// mir_kernels/ops/*/native.py own the tensors and their shapes. The interpreter lock is released during every call.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "frechet/frechet.h"
#include "moca/moca.h"
#include "moments/moments.h"
#include "symmetry/symmetry.h"

namespace py = pybind11;

namespace mir {
namespace {

using Address = std::uintptr_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }
const uint8_t* mask_at(Address address) { return reinterpret_cast<const uint8_t*>(address); }

DType dtype_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("dtype: expected a DTYPES code, got " + std::to_string(code));
  return static_cast<DType>(code);
}

MocaForward moca_forward(Address x, int64_t x_stride, Address scale, Address shift, Address mask, Address out,
                         int64_t out_stride, int64_t rows, int64_t cols, int dtype) {
  return {at(x), x_stride, at(scale), at(shift), mask_at(mask), at(out), out_stride, rows, cols, dtype_of(dtype)};
}

MocaBackward moca_backward(Address grad, int64_t grad_stride, Address x, int64_t x_stride, Address x_rows,
                           Address scale, Address mask, Address dx, int64_t dx_stride, Address partial,
                           Address dscale, Address dshift, int64_t rows, int64_t cols, int dtype) {
  return {at(grad), grad_stride, at(x), x_stride, static_cast<const int64_t*>(at(x_rows)), at(scale), mask_at(mask),
          at(dx), dx_stride, at(partial), at(dscale), at(dshift), rows, cols, dtype_of(dtype)};
}

AddRmsForward add_rms_forward(Address x, int64_t x_stride, Address residual, int64_t residual_stride, Address scale,
                              Address shift, Address mask, Address weight, double eps, Address out,
                              int64_t out_stride, Address h, int64_t h_stride, Address rstd, int64_t rows,
                              int64_t cols, int dtype) {
  return {at(x), at(residual), x_stride, residual_stride, at(scale), at(shift), mask_at(mask), at(weight), eps,
          at(out), at(h), out_stride, h_stride, at(rstd), rows, cols, dtype_of(dtype)};
}

AddRmsBackward add_rms_backward(Address grad_out, int64_t grad_out_stride, Address grad_h, int64_t grad_h_stride,
                                Address h, int64_t h_stride, Address x, int64_t x_stride, Address residual,
                                int64_t residual_stride, Address scale, Address mask, Address weight, Address rstd,
                                Address dx, int64_t dx_stride, Address partial, Address dscale, Address dshift,
                                Address dweight, int64_t rows, int64_t cols, int dtype) {
  return {at(grad_out), at(grad_h), at(h), at(x), at(residual), grad_out_stride, grad_h_stride, h_stride, x_stride,
          residual_stride, at(scale), mask_at(mask), at(weight), at(rstd), at(dx), dx_stride, at(partial), at(dscale),
          at(dshift), at(dweight), rows, cols, dtype_of(dtype)};
}

TokenNorms token_norms(Address x, int64_t x_stride, Address out, int64_t rows, int64_t cols, int dtype) {
  return {at(x), x_stride, static_cast<float*>(at(out)), rows, cols, dtype_of(dtype)};
}

SecondMoment second_moment(Address x, int64_t x_stride, Address shift, Address vectors, Address weights,
                           Address second, int64_t panel, Address sums, Address packed, int64_t rows, int64_t cols,
                           int dtype) {
  if (dtype_of(dtype) == DType::kFloat64) throw std::invalid_argument("dtype: expected float32, float16 or bfloat16");
  return {at(x), x_stride, static_cast<float*>(at(shift)), static_cast<double*>(at(vectors)),
          static_cast<double*>(at(weights)), static_cast<double*>(at(second)), panel, static_cast<double*>(at(sums)),
          static_cast<float*>(at(packed)), rows, cols, dtype_of(dtype)};
}

StandardForm standard_form(Address a, Address b, Address form, Address rounding, Address exponent, Address workspace,
                           int64_t count, int64_t d, int64_t rows, int64_t stride) {
  return {static_cast<double*>(at(a)), static_cast<double*>(at(b)), static_cast<double*>(at(form)),
          static_cast<double*>(at(rounding)), static_cast<double*>(at(exponent)), static_cast<double*>(at(workspace)),
          count, d, rows, stride};
}

int64_t standard_form_workspace(int64_t count, int64_t rows, int threads) {
  return MIR_AT_ISA(standard_form_cpu).workspace({{}, {}, {}, {}, {}, {}, count, rows, rows, rows}, threads);
}

ShiftedFactors shifted_factors(Address form, Address shifts, Address pivots, Address norms, Address workspace,
                               int64_t count, int64_t d, int64_t stride) {
  return {static_cast<double*>(at(form)), static_cast<double*>(at(shifts)), static_cast<double*>(at(pivots)),
          static_cast<double*>(at(norms)), static_cast<double*>(at(workspace)), count, d, stride};
}

BandReduction band_reduction(Address form, Address band, Address workspace, int64_t d, int64_t stride) {
  return {static_cast<double*>(at(form)), static_cast<double*>(at(band)), static_cast<double*>(at(workspace)), d,
          stride};
}

BandInverseTraces band_inverse_traces(Address band, Address shifts, Address traces, Address workspace, int64_t rows,
                                      int64_t width, int64_t count) {
  return {static_cast<double*>(at(band)), static_cast<double*>(at(shifts)), static_cast<double*>(at(traces)),
          static_cast<double*>(at(workspace)), rows, width, count};
}

// Returns the flags of `Symmetric` as an integer.
int64_t symmetry(Address x, Address workspace, int64_t count, int64_t d, double allowed, int dtype, int threads) {
  const Symmetry params = {at(x), static_cast<double*>(at(workspace)), count, d, allowed, dtype_of(dtype)};
  py::gil_scoped_release release;
  return MIR_AT_ISA(symmetry_cpu).check(params, threads);
}

// Workspace of `checked_standard_form` in doubles: both matrices in float64, and the workspace of its kernels.
int64_t checked_standard_form_workspace(int64_t count, int64_t d, int64_t rows, int threads) {
  return 2 * count * d * d +
         std::max(count * kSymmetryNumbers * symmetry_tiles(d), standard_form_workspace(count, rows, threads));
}

// Checks a and b (count, d, d) and computes their standard form (count, rows, rows), all in one call: for a small pair,
// separate calls would take longer than the arithmetic. Returns the flags of `Symmetric` of the first matrix that has
// any except kNotMirrored, and then computes no form; otherwise 0.
int64_t checked_standard_form(Address a, Address b, Address form, Address rounding, Address exponent,
                              Address workspace, int64_t count, int64_t d, int64_t rows, double allowed_a,
                              double allowed_b, int dtype_a, int dtype_b, int threads) {
  double* const copies = static_cast<double*>(at(workspace));
  double* const rest = copies + 2 * count * d * d;
  const Symmetry checks[] = {{at(a), rest, count, d, allowed_a, dtype_of(dtype_a)},
                             {at(b), rest, count, d, allowed_b, dtype_of(dtype_b)}};
  const double* symmetric[2];
  py::gil_scoped_release release;
  for (int i = 0; i < 2; ++i) {
    const Symmetry& given = checks[i];
    const int64_t flags = MIR_AT_ISA(symmetry_cpu).check(given, threads);
    if (flags & ~static_cast<int64_t>(kNotMirrored)) return flags & ~static_cast<int64_t>(kNotMirrored);
    symmetric[i] = static_cast<const double*>(given.x);
    if (flags != 0 || given.dtype != DType::kFloat64) {
      double* const copy = copies + i * count * d * d;
      MIR_AT_ISA(symmetry_cpu).symmetrize({given.x, copy, count, d, given.dtype}, threads);
      symmetric[i] = copy;
    }
  }
  MIR_AT_ISA(standard_form_cpu)
      .run({symmetric[0], symmetric[1], static_cast<double*>(at(form)), static_cast<double*>(at(rounding)),
            static_cast<double*>(at(exponent)), rest, count, d, rows, rows},
           threads);
  return 0;
}

Symmetrize symmetrize(Address x, Address out, int64_t count, int64_t d, int dtype) {
  return {at(x), static_cast<double*>(at(out)), count, d, dtype_of(dtype)};
}

// A Python function with the arguments of `make`, which packs them into the parameter struct, followed by the arguments
// of `run` after the struct (threads, or device and stream).
template <class Params, class... Packed, class... Extra>
auto unlocked(Params (*make)(Packed...), void (*run)(const Params&, Extra...)) {
  return [make, run](Packed... packed, Extra... extra) {
    const Params params = make(packed...);
    py::gil_scoped_release release;
    run(params, extra...);
  };
}

#if defined(MIR_WITH_CUDA)
void moca_forward_on_stream(const MocaForward& p, int device, Address stream) {
  moca_forward_cuda(p, device, at(stream));
}
void moca_backward_on_stream(const MocaBackward& p, int device, Address stream) {
  moca_backward_cuda(p, device, at(stream));
}
#endif

// Names of the instruction set levels that run here, best first.
py::tuple cpu_isas() {
  py::list names;
  for (Isa isa : kIsas) {
    if (runs_here(isa)) names.append(isa_name(isa));
  }
  return py::tuple(names);
}

// The compute capabilities that nvcc compiled for, "80;90" as (80, 90). Empty if the module was built without nvcc.
py::tuple cuda_archs() {
  py::list archs;
  std::istringstream text(MIR_CUDA_ARCHS);
  for (std::string arch; std::getline(text, arch, ';');) archs.append(std::stoi(arch));
  return py::tuple(archs);
}

}  // namespace
}  // namespace mir

PYBIND11_MODULE(_C, m) {
  using namespace mir;
  m.doc() = "Compiled kernels that accept addresses. Call them through mir_kernels, which checks arguments.";
  m.attr("VERSION") = MIR_VERSION;
  m.attr("CPU_ISA") = isa_name(cpu_isa());
  m.attr("CPU_ISAS") = cpu_isas();
  m.attr("CUDA_ARCHS") = cuda_archs();
#ifdef _OPENMP
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;
#endif
  py::dict dtypes;
  dtypes["float32"] = static_cast<int>(DType::kFloat32);
  dtypes["bfloat16"] = static_cast<int>(DType::kBFloat16);
  dtypes["float16"] = static_cast<int>(DType::kFloat16);
  dtypes["float64"] = static_cast<int>(DType::kFloat64);
  m.attr("DTYPES") = dtypes;

  m.def("moca_partial_rows", [](int64_t rows) { return moca_partial_rows(rows); });
  m.def("moca_forward", unlocked(moca_forward, MIR_AT_ISA(moca_cpu).forward));
  m.def("moca_backward", unlocked(moca_backward, MIR_AT_ISA(moca_cpu).backward));
  m.def("add_rms_forward", unlocked(add_rms_forward, MIR_AT_ISA(add_rms_cpu).forward));
  m.def("add_rms_backward", unlocked(add_rms_backward, MIR_AT_ISA(add_rms_cpu).backward));
  m.def("token_norms", unlocked(token_norms, MIR_AT_ISA(moments_cpu).token_norms));
  m.def("second_moment", unlocked(second_moment, MIR_AT_ISA(second_moment_cpu).add));
  m.def("second_moment_workspace", MIR_AT_ISA(second_moment_cpu).workspace);
  m.def("symmetry", symmetry);
  m.def("symmetry_workspace", [](int64_t count, int64_t d) { return count * kSymmetryNumbers * symmetry_tiles(d); });
  m.def("symmetrize", unlocked(symmetrize, MIR_AT_ISA(symmetry_cpu).symmetrize));
  m.attr("NOT_MIRRORED") = static_cast<int64_t>(kNotMirrored);
  m.def("standard_form", unlocked(standard_form, MIR_AT_ISA(standard_form_cpu).run));
  m.def("standard_form_workspace", standard_form_workspace);
  m.def("checked_standard_form", checked_standard_form);
  m.def("checked_standard_form_workspace", checked_standard_form_workspace);
  m.attr("STANDARD_FORM_BLOCK") = MIR_AT_ISA(standard_form_cpu).block;
  m.def("shifted_factors", unlocked(shifted_factors, MIR_AT_ISA(shifted_factors_cpu).run));
  m.def("shifted_factors_workspace", MIR_AT_ISA(shifted_factors_cpu).workspace);
  m.def("roundings", MIR_AT_ISA(shifted_factors_cpu).roundings);
  m.def("band_reduction", unlocked(band_reduction, MIR_AT_ISA(band_reduction_cpu).run));
  m.def("band_reduction_workspace", MIR_AT_ISA(band_reduction_cpu).workspace);
  m.attr("BAND_WIDTH") = MIR_AT_ISA(band_reduction_cpu).width;
  m.def("band_inverse_traces", unlocked(band_inverse_traces, MIR_AT_ISA(band_inverse_traces_cpu).run));
  m.def("band_inverse_traces_workspace", MIR_AT_ISA(band_inverse_traces_cpu).workspace);
#if defined(MIR_WITH_CUDA)
  m.def("moca_forward_cuda", unlocked(moca_forward, moca_forward_on_stream));
  m.def("moca_backward_cuda", unlocked(moca_backward, moca_backward_on_stream));
#endif
}
