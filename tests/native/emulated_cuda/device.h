// A CUDA device on one CPU thread, as strict as compute-sanitizer's memcheck, initcheck, racecheck and synccheck.
//
// The .cu file is compiled with -fsanitize=thread,alignment and linked without the sanitizers' runtimes: the compiler
// puts a call before every access to memory, and memory.cpp defines the functions called. Before an access happens they
// know its address, width and thread, and hold it against what the caller declared of that byte and what other threads
// did to it. The first wrong access ends the launch, unexecuted, with an error as a device gives and a report in words.
//
// A sanitizer build (EMULATED_CHECKS 0) has ASan and UBSan look instead, which know arrays but neither threads nor
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
bool running();                                               // whether a kernel's thread is
bool is_private(uintptr_t address);                           // whether on its stack, a parameter, or its place
int thread_number();                                          // in the block, x fastest
int64_t block_number();                                       // in the grid, x fastest
void stop(cudaError_t error, const std::string& what);        // ends the launch; does not return to a kernel
std::string here();                                           // "block (0, 1, 0), thread (3, 0, 0)"
const std::string& report();                                  // of the launch that failed last
void set_backwards(bool backwards);                           // last block and last thread first
void use_device(int count);                                   // forgets launches, report and the current device

// The launches since use_device(), a line each: device, stream, grid and block.
const std::string& launches();

// memory.cpp: what each byte is and who used it last.
enum Use { kRead = 1, kWrite = 2, kDefined = 4 };
// Lets kernels use `rows` rows of `width` bytes, `stride` bytes apart; all of them or those where chosen[row] != 0.
void declare(uintptr_t address, int64_t rows, int64_t width, int64_t stride, const uint8_t* chosen, int use);
void forget_memory();
void begin_launch();
void begin_block();
void next_barrier();

}  // namespace emulated
