// Replaces csrc/common/parallel.h in the build that tests/native/sanitize.py checks for data races. ThreadSanitizer
// supports std::thread, but not the barriers of GCC's OpenMP, for which it would report false races.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace mir {
namespace MIR_ISA {
namespace {

// As in that file, but every loop with two or more iterations uses threads, however small, to give races more chances.
template <class F>
void parallel_for(int64_t n, int threads, int64_t, const F& f) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> team;
  for (int t = 0; t < threads && t < n; ++t) {
    team.emplace_back([&] {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
    });
  }
  for (std::thread& member : team) member.join();
}

}  // namespace
}  // namespace MIR_ISA
}  // namespace mir
