// Takes the place of csrc/common/parallel.h in the build that tests/native/sanitize.py checks for data races:
// ThreadSanitizer follows std::thread, but not the barriers of GCC's OpenMP, and would report races that are none.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace mir {
namespace MIR_ISA {
namespace {

// As there, but every loop of two or more is shared out, however small, for the sake of more chances to race.
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
