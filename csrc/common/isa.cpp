// Selects the instruction set level, once per process.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mir {

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kX86_64V4Vnni:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni") && runs_here(Isa::kX86_64V3);
    case Isa::kX86_64V3:  // every CPU with AVX2 and FMA also converts half precision (F16C)
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kBaseline:
      return true;
  }
#endif
  return isa == Isa::kBaseline;
}

namespace {

Isa choose() {
  const char* wanted = std::getenv("MIR_CPU_ISA");
  const bool by_name = wanted != nullptr && *wanted != '\0';
  for (Isa isa : kIsas) {
    if (by_name ? std::strcmp(wanted, isa_name(isa)) == 0 && runs_here(isa) : runs_here(isa)) return isa;
  }
  std::string available;
  for (Isa isa : kIsas) {
    if (runs_here(isa)) available += (available.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::runtime_error("MIR_CPU_ISA: expected one of " + available + " on this CPU, got " + wanted);
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
#if defined(__x86_64__)
  return isa == Isa::kX86_64V4Vnni ? "x86-64-v4-vnni" : isa == Isa::kX86_64V3 ? "x86-64-v3" : "x86-64";
#else
  return isa == Isa::kBaseline ? "baseline" : "unavailable";
#endif
}

}  // namespace mir
