// Functions of the emulated device that Python calls by ctypes; see ../emulated.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <exception>

#include "../../../csrc/moca/moca.h"
#include "device.h"
#include "planted.h"

namespace {

std::string text;  // message of the last failed call

// The message of the exception of f and the device's report, or "".
template <class F>
const char* outcome(const F& f) {
  try {
    f();
    return "";
  } catch (const std::exception& error) {
    text = error.what();
    if (!emulated::report().empty()) text += "; " + emulated::report();
    return text.c_str();
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int emulated_checks() { return EMULATED_CHECKS; }
void emulated_use_device(int count) {
  emulated::use_device(count);
  emulated::forget_memory();
}
void emulated_set_backwards(int backwards) { emulated::set_backwards(backwards != 0); }
const char* emulated_launches() { return emulated::launches().c_str(); }
int emulated_last_error() { return cudaGetLastError(); }
int emulated_device() {
  int device = -1;
  cudaGetDevice(&device);
  return device;
}
void emulated_declare(uintptr_t address, int64_t rows, int64_t width, int64_t stride, const uint8_t* chosen, int use) {
  emulated::declare(address, rows, width, stride, chosen, use);
}

int64_t emulated_moca_partial_rows(int64_t rows) { return mir::moca_partial_rows(rows); }

const char* emulated_moca_forward(const void* x, int64_t x_stride, const void* scale, const void* shift,
                                  const uint8_t* mask, void* out, int64_t out_stride, int64_t rows, int64_t cols,
                                  int dtype, int device, void* stream) {
  const auto type = static_cast<mir::DType>(dtype);
  const mir::MocaForward p{x, x_stride, scale, shift, mask, out, out_stride, rows, cols, type};
  return outcome([&] { mir::moca_forward_cuda(p, device, stream); });
}

const char* emulated_moca_backward(const void* grad, int64_t grad_stride, const void* x, int64_t x_stride,
                                   const int64_t* x_rows, const void* scale, const uint8_t* mask, void* dx,
                                   int64_t dx_stride, void* partial, void* dscale, void* dshift, int64_t rows,
                                   int64_t cols, int dtype, int device, void* stream) {
  const mir::MocaBackward p{grad, grad_stride, x, x_stride, x_rows, scale, mask, dx, dx_stride, partial, dscale, dshift,
                            rows, cols, static_cast<mir::DType>(dtype)};
  return outcome([&] { mir::moca_backward_cuda(p, device, stream); });
}

const char* emulated_planted(const char* name, const float* a, float* out, int64_t n, const unsigned* grid,
                             const unsigned* block) {
  return outcome([&] {
    mir::planted(name, a, out, n, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]));
  });
}

// Converts elements of x to 16 bits, and back.
void emulated_to_bfloat16(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = __float2bfloat16_rn(x[i]).bits;
}
void emulated_to_float16(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = __float2half_rn(x[i]).bits;
}
void emulated_from_bfloat16(const uint16_t* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = __bfloat162float({x[i]});
}
void emulated_from_float16(const uint16_t* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = __half2float({x[i]});
}

}  // extern "C"
#pragma GCC visibility pop
