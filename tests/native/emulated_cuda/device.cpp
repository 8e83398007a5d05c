// Launches, fibers and barriers of the emulated device (device.h).
#include "device.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulated {

Place place;

namespace {

constexpr int kThreads = 1024;                     // maximum per block
constexpr size_t kStack = 128 << 10;               // bytes of a fiber's stack; pages are allocated on first use
constexpr unsigned kGridX = 0x7fffffff, kGridYZ = 65535;
constexpr size_t kShared = 48 << 10;

enum class State { kReady, kAtBarrier, kDone };

struct Fiber {
  ucontext_t context;
  uint3 thread;
  State state;
  void* fake_stack;
};

struct Device {
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  const Thread* thread = nullptr;
  uintptr_t parameters = 0, parameter_bytes = 0;
  int current = -1;  // fiber
  int64_t block = 0;
  cudaError_t failure = cudaSuccess, last = cudaSuccess;
  std::string report, launches;
  bool backwards = false;
  int device = 0, devices = 1;
};
Device self;

void swap(ucontext_t& from, const ucontext_t& to) {
#if defined(__SANITIZE_ADDRESS__)  // its own swapcontext does not know of the calls around this one, and warns
  static const auto of_libc =
      reinterpret_cast<decltype(&swapcontext)>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "swapcontext"));
  of_libc(&from, &to);
#else
  swapcontext(&from, &to);
#endif
}

char* stack_of(int fiber) { return self.stacks + fiber * kStack; }

void leave(Fiber& fiber, [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, self.scheduler_stack,
                                 self.scheduler_stack_bytes);
#endif
  swap(fiber.context, self.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &self.scheduler_stack, &self.scheduler_stack_bytes);
#endif
}

void enter(int number) {
  Fiber& fiber = self.fibers[number];
  self.current = number;
  place.thread = fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self.scheduler_fake_stack, stack_of(number), kStack);
#endif
  swap(self.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.scheduler_fake_stack, nullptr, nullptr);
#endif
  self.current = -1;
}

void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack, &self.scheduler_stack_bytes);
#endif
  Fiber& fiber = self.fibers[self.current];
  self.thread->run(self.thread->code);
  fiber.state = State::kDone;
  leave(fiber, true);
}

void prepare(int number) {
  Fiber& fiber = self.fibers[number];
  const unsigned x = place.threads.x, y = place.threads.y, n = static_cast<unsigned>(number);
  fiber.thread = {n % x, n / x % y, n / x / y};
  fiber.state = State::kReady;
  fiber.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_of(number), kStack);  // may be left from a failed launch
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(number);
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
}

// Runs all threads from barrier to barrier until every thread has returned or the launch has failed.
void run_block(int threads) {
  begin_block();
  for (int i = 0; i < threads; ++i) prepare(i);
  for (;;) {
    int waiting = 0, done = 0;
    for (int i = 0; i < threads; ++i) {
      const int number = self.backwards ? threads - 1 - i : i;
      Fiber& fiber = self.fibers[number];
      if (fiber.state != State::kDone) enter(number);
      if (self.failure != cudaSuccess) return;
      waiting += fiber.state == State::kAtBarrier;
      done += fiber.state == State::kDone;
    }
    if (waiting == 0) return;
    if (done != 0) {
      stop(cudaErrorLaunchFailure, std::to_string(waiting) + " threads of a block wait at a barrier, but " +
                                       std::to_string(done) + " have returned");
      return;
    }
    next_barrier();
  }
}

bool valid(const cudaLaunchConfig_t& config) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= kGridX && grid.y <= kGridYZ && grid.z <= kGridYZ &&
         threads >= 1 && threads <= kThreads && block.x <= kThreads && block.y <= kThreads && block.z <= 64 &&
         config.dynamicSmemBytes <= kShared;
}

std::string triple(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

}  // namespace

bool running() { return self.current >= 0; }

bool is_private(uintptr_t address) {
  const auto own = reinterpret_cast<uintptr_t>(&place);
  const auto stack = reinterpret_cast<uintptr_t>(stack_of(self.current));
  return address - stack < kStack || address - own < sizeof(place) || address - self.parameters < self.parameter_bytes;
}

int thread_number() { return self.current; }
int64_t block_number() { return self.block; }

std::string here() {
  const uint3 &b = place.block, &t = place.thread;
  return "block " + triple(b.x, b.y, b.z) + ", thread " + triple(t.x, t.y, t.z);
}

void stop(cudaError_t error, const std::string& what) {
  self.failure = error;
  self.report = what;
  if (running()) leave(self.fibers[self.current], true);
}

const std::string& report() { return self.report; }
const std::string& launches() { return self.launches; }
void set_backwards(bool backwards) { self.backwards = backwards; }

void use_device(int count) {
  self.device = 0;
  self.devices = count;
  self.failure = self.last = cudaSuccess;
  self.report.clear();
  self.launches.clear();
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* frame, const Thread& thread) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (!valid(config)) return self.last = cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes != 0 || config.numAttrs != 0) return self.last = cudaErrorNotSupported;
  self.launches += "device " + std::to_string(self.device) + ", stream " +
                   std::to_string(reinterpret_cast<uintptr_t>(config.stream)) + ", grid " +
                   triple(grid.x, grid.y, grid.z) + ", block " + triple(block.x, block.y, block.z) + "\n";
  if (self.stacks == nullptr) {
    void* stacks = mmap(nullptr, kThreads * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::bad_alloc();
    self.stacks = static_cast<char*>(stacks);
    self.fibers.resize(kThreads);
  }
  self.thread = &thread;
  self.parameters = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  self.parameter_bytes = reinterpret_cast<uintptr_t>(frame) - self.parameters;
  self.failure = cudaSuccess;
  self.report.clear();
  place.threads = block;
  place.blocks = grid;
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  begin_launch();
  for (int64_t i = 0; i < blocks && self.failure == cudaSuccess; ++i) {
    self.block = self.backwards ? blocks - 1 - i : i;
    place.block = {static_cast<unsigned>(self.block % grid.x), static_cast<unsigned>(self.block / grid.x % grid.y),
                   static_cast<unsigned>(self.block / grid.x / grid.y)};
    run_block(threads);
  }
  if (self.failure != cudaSuccess) self.last = self.failure;
  return self.failure;
}

}  // namespace emulated

// As in CUDA, an error persists until it is read.
cudaError_t cudaGetLastError() {
  const cudaError_t error = emulated::self.last;
  emulated::self.last = cudaSuccess;
  return error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = emulated::self.device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulated::self.devices) return emulated::self.last = cudaErrorInvalidDevice;
  emulated::self.device = device;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorMisalignedAddress: return "misaligned address";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotSupported: return "operation not supported";
  }
  return "unrecognized error code";
}

void __syncthreads() {
  emulated::Fiber& fiber = emulated::self.fibers[emulated::self.current];
  fiber.state = emulated::State::kAtBarrier;
  emulated::leave(fiber, false);
  fiber.state = emulated::State::kReady;
}
