// CPU kernels are compiled once per instruction set and selected at run time.
//
// Every *_cpu.cpp is compiled with -DMIR_ISA=<namespace> and the flags of that level, and defines everything in
// mir::MIR_ISA. For this to be safe, such a file and every header it includes must not define or instantiate inline
// code outside an anonymous namespace inside mir::MIR_ISA. For example, an inline function of the standard library
// would be emitted in each object as a weak symbol. The linker keeps any one of them, perhaps the one with AVX-512
// instructions, and the baseline code then calls it. Therefore: C headers only, no <vector>, no <algorithm>.
#pragma once

namespace mir {

// The last one is AVX-512 with dot products of 16-bit integers: Cascade Lake, Zen 4 and later. The few earlier AVX-512
// CPUs slow down with wide vectors and lose little with narrower ones.
enum class Isa { kBaseline, kX86_64V3, kX86_64V4Vnni };

// The best level that this CPU and this build support, or the one named by the environment variable MIR_CPU_ISA
// ("x86-64", "x86-64-v3", "x86-64-v4-vnni"; "baseline" on other CPUs). The variable is read once; a level that is
// unknown or cannot run here throws std::runtime_error.
Isa cpu_isa();
const char* isa_name(Isa isa);

// All levels, best first, and whether this build and this CPU support a level.
constexpr Isa kIsas[] = {Isa::kX86_64V4Vnni, Isa::kX86_64V3, Isa::kBaseline};
bool runs_here(Isa isa);

}  // namespace mir

// Each level defines `kernels`, a table of function pointers, in its namespace. MIR_AT_ISA selects the level in use.
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
