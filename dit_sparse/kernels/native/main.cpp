// SPDX-License-Identifier: Apache-2.0
// What the library exports, and which instruction set answers.
#include "call.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

#ifndef DIT_SPARSE_SOURCE_HASH
#define DIT_SPARSE_SOURCE_HASH "unknown"
#endif
#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#define DECLARE(isa) namespace isa { int32_t work(Call& call); }
#if defined(__x86_64__) || defined(_M_X64)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(wide)
#elif defined(__aarch64__)
DECLARE(neon)
#endif

// Bits of dit_sparse_instruction_sets, and the names that Python has for them.
enum Set : int32_t { AVX2 = 1, AVX512 = 2, NEON = 4, WIDE = 8 };

EXPORT int32_t dit_sparse_abi_version() { return ABI_VERSION; }
EXPORT const char* dit_sparse_source_hash() { return DIT_SPARSE_SOURCE_HASH; }

#if defined(__x86_64__) || defined(_M_X64)
static bool all(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

// By cpuid, not by __builtin_cpu_supports: under Zig 0.17 that finds no instruction set at all.
static int32_t x86_sets() {
  constexpr uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28;         // leaf 1, ecx
  constexpr uint32_t avx2 = 1u << 5, avx512f = 1u << 16, avx512dq = 1u << 17;    // leaf 7, ebx
  constexpr uint32_t avx512bw = 1u << 30, avx512vl = 1u << 31;
  constexpr uint32_t ymm = 0x6, zmm = 0xe6;  // registers that the operating system saves: XCR0
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !all(ecx, fma | osxsave | avx)) return 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
  uint32_t saved, high;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!all(ebx, avx2) || !all(saved, ymm)) return 0;
  const bool wide = all(ebx, avx512f | avx512dq | avx512bw | avx512vl) && all(saved, zmm);
  return AVX2 | WIDE | (wide ? AVX512 : 0);
}
#endif

// Which instruction sets this processor has and the library holds. WIDE is the code of AVX-512
// compiled for AVX2: for tests, where there is no AVX-512.
EXPORT int32_t dit_sparse_instruction_sets() {
#if defined(__x86_64__) || defined(_M_X64)
  return x86_sets();
#elif defined(__aarch64__)
  return NEON;
#else
  return 0;
#endif
}

static int32_t work(Call& call) {
  if (!(dit_sparse_instruction_sets() & call.instruction_set)) return NO_INSTRUCTIONS;
  switch (call.instruction_set) {
#if defined(__x86_64__) || defined(_M_X64)
    case AVX2: return avx2::work(call);
    case AVX512: return avx512::work(call);
    case WIDE: return wide::work(call);
#elif defined(__aarch64__)
    case NEON: return neon::work(call);
#endif
    default: return NO_INSTRUCTIONS;
  }
}

// Take pieces of work until none is left. All threads of a team call it with the same Call; it has
// the form that OpenMP's GOMP_parallel wants of a function.
EXPORT void dit_sparse_work(void* shared) {
  Call& call = *(Call*)shared;
  const int32_t result = work(call);
  if (result != DONE) __atomic_store_n(&call.result, result, __ATOMIC_RELAXED);
}
