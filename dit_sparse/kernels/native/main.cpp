// SPDX-License-Identifier: Apache-2.0
// What the library exports, and which instruction set answers.
#include "call.h"

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

// Which instruction sets this processor has and the library holds. WIDE is the code of AVX-512
// compiled for AVX2: for tests, where there is no AVX-512.
EXPORT int32_t dit_sparse_instruction_sets() {
  int32_t found = 0;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found |= AVX2 | WIDE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
      found |= AVX512;
  }
#elif defined(__aarch64__)
  found |= NEON;
#endif
  return found;
}

// Take pieces of work until none is left; several threads may call it with one Call.
EXPORT int32_t dit_sparse_work(Call* call, int32_t instruction_set) {
  if (!(dit_sparse_instruction_sets() & instruction_set)) return NO_INSTRUCTIONS;
  switch (instruction_set) {
#if defined(__x86_64__) || defined(_M_X64)
    case AVX2: return avx2::work(*call);
    case AVX512: return avx512::work(*call);
    case WIDE: return wide::work(*call);
#elif defined(__aarch64__)
    case NEON: return neon::work(*call);
#endif
    default: return NO_INSTRUCTIONS;
  }
}
