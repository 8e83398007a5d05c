// The memory of the emulated device: the allowed uses and last accesses of each byte, and the functions that g++ calls
// before every access with -fsanitize=thread,alignment (device.h).
#include "device.h"

#include <elf.h>
#include <link.h>

#include <vector>

namespace emulated {
namespace {

constexpr int64_t kShared = 48 << 10;  // maximum bytes of static shared memory per block

// The time and thread of an access. A span is a launch, or a block for shared memory. Two accesses to a byte are
// ordered if their spans differ, if their threads are the same, or if they are in one block with a barrier between.
struct Moment {
  int64_t span = 0, block = 0;
  int barrier = 0, thread = 0;
};

struct Byte {
  uint8_t use = 0;
  bool many_threads = false, many_blocks = false;  // that have read since the last barrier, in this span
  Moment wrote, read;
};

struct Region {
  uintptr_t begin = 0;
  std::vector<Byte> bytes;
  bool shared = false;

  uintptr_t end() const { return begin + bytes.size(); }
  bool has(uintptr_t address) const { return address >= begin && address < end(); }
};

struct Memory {
  std::vector<Region> declared;
  Region shared;
  int64_t launches = 0, blocks = 0, shared_bytes = 0;
  int barrier = 0;
  size_t latest = 0;  // index into declared
};
Memory self;

Region* find(uintptr_t address) {
  if (self.latest < self.declared.size() && self.declared[self.latest].has(address)) {
    return &self.declared[self.latest];
  }
  for (size_t i = 0; i < self.declared.size(); ++i) {
    if (self.declared[i].has(address)) {
      self.latest = i;
      return &self.declared[i];
    }
  }
  return self.shared.has(address) ? &self.shared : nullptr;
}

std::string described(const char* what, bool write, uintptr_t address, size_t bytes, const Region* region) {
  std::string text = here() + ": " + what + (write ? " write" : " read") + " of " + std::to_string(bytes) + " bytes";
  if (region == nullptr) return text + " at an address that was not declared";
  if (region->shared) return text + " of shared memory";
  return text + ", " + std::to_string(address - region->begin) + " bytes into an array of " +
         std::to_string(region->bytes.size());
}

bool same_span(const Moment& then, const Moment& now) { return then.span != 0 && then.span == now.span; }

// Whether an earlier access and the current one are not ordered.
bool at_once(const Moment& then, const Moment& now) {
  if (!same_span(then, now)) return false;
  return then.block != now.block || (then.barrier == now.barrier && then.thread != now.thread);
}

// Returns the error of an access to one byte, or null; records the access.
const char* use_byte(Byte& byte, const Moment& now, bool write, bool shared) {
  if (!shared && !(byte.use & (write ? kWrite : kRead))) return "forbidden";
  if (write) {
    if (at_once(byte.wrote, now)) return "write-after-write race:";
    if (same_span(byte.read, now)) {
      const bool others = byte.read.barrier == now.barrier && (byte.many_threads || byte.read.thread != now.thread);
      if (byte.many_blocks || byte.read.block != now.block || others) return "write-after-read race:";
    }
    if (shared && byte.wrote.span != now.span) ++self.shared_bytes;
    byte.wrote = now;
    byte.use |= kDefined;
    return nullptr;
  }
  if (shared ? byte.wrote.span != now.span : !(byte.use & kDefined)) return "uninitialised";
  if (at_once(byte.wrote, now)) return "read-after-write race:";
  if (!same_span(byte.read, now)) {
    byte.many_threads = byte.many_blocks = false;
  } else if (byte.read.block != now.block) {
    byte.many_blocks = true;
    byte.many_threads = false;
  } else if (byte.read.barrier != now.barrier) {
    byte.many_threads = false;
  } else if (byte.read.thread != now.thread) {
    byte.many_threads = true;
  }
  byte.read = now;
  return nullptr;
}

[[maybe_unused]] void access(void* pointer, size_t bytes, bool write) {
  if (!running()) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (is_private(address)) return;
  Region* region = find(address);
  if (region == nullptr || address + bytes > region->end()) {
    stop(cudaErrorIllegalAddress, described("forbidden", write, address, bytes, region));
  }
  const Moment now{region->shared ? self.blocks : self.launches, block_number(), self.barrier, thread_number()};
  for (size_t i = 0; i < bytes; ++i) {
    const char* wrong = use_byte(region->bytes[address - region->begin + i], now, write, region->shared);
    if (wrong != nullptr) {
      const bool forbidden = wrong[0] == 'f';
      stop(forbidden ? cudaErrorIllegalAddress : cudaErrorLaunchFailure,
           described(wrong, write, address, bytes, region));
    }
  }
  if (self.shared_bytes > kShared) stop(cudaErrorLaunchFailure, "more than 48 KB of shared memory per block");
}

// Finds the static variables of this library, which are the shared memory of all kernels.
int find_statics(dl_phdr_info* info, size_t, void*) {
  const auto own = reinterpret_cast<uintptr_t>(&self);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD && (part.p_flags & PF_W) && own >= begin && own < begin + part.p_memsz) {
      self.shared.begin = begin;
      self.shared.bytes.resize(part.p_memsz);
      self.shared.shared = true;
      return 1;
    }
  }
  return 0;
}

}  // namespace

void declare(uintptr_t address, int64_t rows, int64_t width, int64_t stride, const uint8_t* chosen, int use) {
  if (rows <= 0 || width <= 0) return;
  const uintptr_t end = address + static_cast<uintptr_t>((rows - 1) * stride + width);
  Region merged;
  merged.begin = address;
  uintptr_t last = end;
  for (const Region& region : self.declared) {
    if (region.begin < end && address < region.end()) {
      merged.begin = std::min(merged.begin, region.begin);
      last = std::max(last, region.end());
    }
  }
  merged.bytes.resize(last - merged.begin);
  for (size_t i = self.declared.size(); i-- > 0;) {
    const Region& region = self.declared[i];
    if (region.begin < end && address < region.end()) {
      std::copy(region.bytes.begin(), region.bytes.end(), merged.bytes.begin() + (region.begin - merged.begin));
      self.declared.erase(self.declared.begin() + static_cast<int64_t>(i));
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (chosen != nullptr && chosen[row] == 0) continue;
    Byte* bytes = &merged.bytes[address - merged.begin + static_cast<uintptr_t>(row * stride)];
    for (int64_t i = 0; i < width; ++i) bytes[i].use |= static_cast<uint8_t>(use);
  }
  self.declared.push_back(std::move(merged));
}

void forget_memory() { self.declared.clear(); }

void begin_launch() {
  if (self.shared.bytes.empty()) dl_iterate_phdr(find_statics, nullptr);
  ++self.launches;
}

void begin_block() {
  ++self.blocks;
  self.barrier = 0;
  self.shared_bytes = 0;
}

void next_barrier() { ++self.barrier; }

}  // namespace emulated

#if EMULATED_CHECKS
extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define EMULATED_ACCESS(bytes)                                            \
  void __tsan_read##bytes(void* p) { emulated::access(p, bytes, false); } \
  void __tsan_write##bytes(void* p) { emulated::access(p, bytes, true); }
EMULATED_ACCESS(1)
EMULATED_ACCESS(2)
EMULATED_ACCESS(4)
EMULATED_ACCESS(8)
EMULATED_ACCESS(16)
#undef EMULATED_ACCESS

void __tsan_read_range(void* p, size_t bytes) { emulated::access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emulated::access(p, bytes, true); }

// The compiler's record of an access through a pointer that is misaligned for its type.
struct TypeMismatch {
  struct {
    const char* file;
    uint32_t line, column;
  } place;
  const void* type;
  uint8_t log_alignment, kind;
};

void __ubsan_handle_type_mismatch_v1(TypeMismatch* wrong, uintptr_t address) {
  if (!emulated::running()) return;
  emulated::stop(cudaErrorMisalignedAddress, emulated::here() + ": line " + std::to_string(wrong->place.line) +
                                                 ": misaligned by " +
                                                 std::to_string(address % (uintptr_t{1} << wrong->log_alignment)) +
                                                 " of " + std::to_string(1 << wrong->log_alignment) + " bytes");
}

}  // extern "C"
#endif
