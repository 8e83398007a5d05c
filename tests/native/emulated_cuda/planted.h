// See planted.cu. n: determines whether the kernel is correct; see tests/native/test_emulated_device.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace mir {

void planted(const std::string& name, const float* a, float* out, int64_t n, dim3 grid, dim3 block);

}  // namespace mir
