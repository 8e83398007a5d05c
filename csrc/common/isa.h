// CPU kernels are compiled once per instruction set and chosen at run time.
//
// Every *_cpu.cpp is compiled with -DMIR_ISA=<namespace> and that level's flags, and puts all it defines into
// mir::MIR_ISA. The rule that keeps this safe: such a file, and every header it includes, may define or instantiate
// nothing inline outside an anonymous namespace inside mir::MIR_ISA. An inline function of the standard library,
// say, would be emitted in each object as one weak symbol; the linker keeps any of them, perhaps the one with
// AVX-512 instructions, and the baseline code then calls it. So: C headers only, no <vector>, no <algorithm>.
#pragma once

namespace mir {

// The last one is AVX-512 with the dot products of 16-bit integers: Cascade Lake, Zen 4 and later. Its few predecessors
// slow down for wide vectors, and lose little with narrower ones.
enum class Isa { kBaseline, kX86_64V3, kX86_64V4Vnni };

// The best level that this CPU and this build have, or the one named by the environment variable MIR_CPU_ISA
// ("x86-64", "x86-64-v3", "x86-64-v4-vnni"; "baseline" on other CPUs). Read once; throws std::runtime_error for a level
// that is unknown or cannot run here.
Isa cpu_isa();
const char* isa_name(Isa isa);

// Every level, best first, and whether this build and this CPU have it.
constexpr Isa kIsas[] = {Isa::kX86_64V4Vnni, Isa::kX86_64V3, Isa::kBaseline};
bool runs_here(Isa isa);

}  // namespace mir

// `kernels`, a table of function pointers that every level defines in its own namespace, at the level in use.
#if defined(__x86_64__)
#define MIR_DECLARE_PER_ISA(declaration)       \
  namespace baseline { extern declaration; }   \
  namespace x86_64_v3 { extern declaration; }  \
  namespace x86_64_v4_vnni { extern declaration; }
#define MIR_AT_ISA(kernels)                                        \
  (::mir::cpu_isa() == ::mir::Isa::kX86_64V4Vnni ? x86_64_v4_vnni::kernels \
   : ::mir::cpu_isa() == ::mir::Isa::kX86_64V3 ? x86_64_v3::kernels \
                                               : baseline::kernels)
#else
#define MIR_DECLARE_PER_ISA(declaration) \
  namespace baseline { extern declaration; }
#define MIR_AT_ISA(kernels) (baseline::kernels)
#endif
