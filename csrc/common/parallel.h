// Parallel loop for CPU kernels (see isa.h for the namespace rule).
#pragma once

#include <cstdint>

namespace mir {
namespace MIR_ISA {
namespace {

// Calls f(i) for i in [0, n) on up to `threads` threads, in any order. For results with the same bits at every thread
// count, f(i) must depend on i alone. If `bytes` is below a quarter megabyte, all work stays on the calling thread. If
// n is the number of threads, f(i) runs on the same thread in every call, with its last results in that core's cache.
template <class F>
void parallel_for(int64_t n, int threads, int64_t bytes, const F& f) {
#ifdef _OPENMP
  if (threads > 1 && n > 1 && bytes >= (int64_t{1} << 18)) {
    const int team = n < threads ? static_cast<int>(n) : threads;
    if (n == team) {
#pragma omp parallel for schedule(static, 1) num_threads(team)
      for (int64_t i = 0; i < n; ++i) f(i);
      return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace
}  // namespace MIR_ISA
}  // namespace mir
