// Adds partial rows to column sums on the CPU, in fixed order (see isa.h for the namespace rule).
#pragma once

#include <cstdint>

#include "../common/parallel.h"

namespace mir {
namespace MIR_ISA {
namespace {

// sums[s][c] = sum over chunks of partials[chunk][s][c], in the order of chunks, in double.
template <int kSums, class A>
void add_partial_rows(const A* partials, int64_t chunks, int64_t cols, A* const (&sums)[kSums], int threads) {
  constexpr int64_t kBlock = 256;
  const int64_t blocks = (cols + kBlock - 1) / kBlock, bytes = chunks * cols * static_cast<int64_t>(sizeof(A)) * kSums;
  parallel_for(kSums * blocks, threads, bytes, [&](int64_t i) {
    const int64_t s = i / blocks, start = i % blocks * kBlock;
    const int64_t width = cols - start < kBlock ? cols - start : kBlock;
    double total[kBlock] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const A* part = partials + (chunk * kSums + s) * cols + start;
      for (int64_t c = 0; c < width; ++c) total[c] += part[c];
    }
    for (int64_t c = 0; c < width; ++c) sums[s][start + c] = static_cast<A>(total[c]);
  });
}

}  // namespace
}  // namespace MIR_ISA
}  // namespace mir
