// A CUDA device on one CPU thread, as strict as compute-sanitizer's memcheck, initcheck, racecheck and synccheck.
//
// The .cu file is compiled with -fsanitize=thread,alignment and linked without the sanitizers' runtimes. The compiler
// inserts a call before every memory access, and memory.cpp defines the functions called. They get the address and
// width of the access before it happens, and check it against the caller's declarations and earlier accesses of other
// threads. The first invalid access is not executed and ends the launch with a CUDA error and a report.
//
// A sanitizer build (EMULATED_CHECKS 0) uses ASan and UBSan instead, which check array bounds but neither threads nor
// declarations.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#if !defined(EMULATED_CHECKS)
#define EMULATED_CHECKS 1
#endif

namespace emulated {

// device.cpp: launches, fibers and barriers.
bool running();                                               // whether a thread of a kernel is running
bool is_private(uintptr_t address);                           // on the thread's stack, a parameter, or its indices
int thread_number();                                          // in the block, x fastest
int64_t block_number();                                       // in the grid, x fastest
void stop(cudaError_t error, const std::string& what);        // ends the launch; does not return to a kernel
std::string here();                                           // "block (0, 1, 0), thread (3, 0, 0)"
const std::string& report();                                  // of the last failed launch
void set_backwards(bool backwards);                           // runs the last block and the last thread first
void use_device(int count);                                   // resets launches, report and the current device

// The launches since use_device(), one per line: device, stream, grid and block.
const std::string& launches();

// memory.cpp: the allowed uses and last accesses of each byte.
enum Use { kRead = 1, kWrite = 2, kDefined = 4 };
// Lets kernels use `rows` rows of `width` bytes, `stride` bytes apart; if given, only rows with chosen[row] != 0.
void declare(uintptr_t address, int64_t rows, int64_t width, int64_t stride, const uint8_t* chosen, int use);
void forget_memory();
void begin_launch();
void begin_block();
void next_barrier();

}  // namespace emulated
