// SPDX-License-Identifier: Apache-2.0
// Run calls from a file: how the native kernel is tried for a processor that is not here, in an
// emulator. A pointer in the file is its place in the call's memory, plus one; 0 is null.
#include <cstdio>
#include <cstdlib>

#include "call.h"

extern "C" void dit_sparse_work(void* shared);

static void take(FILE* file, void* into, size_t bytes) {
  if (fread(into, 1, bytes, file) != bytes) exit(2);
}

template <typename T>
static void place(T*& pointer, char* memory) {
  if (pointer) pointer = (T*)(memory + (size_t)pointer - 1);
}

int main(int count, char** arguments) {
  if (count != 3) return 2;
  FILE *in = fopen(arguments[1], "rb"), *out = fopen(arguments[2], "wb");
  if (!in || !out) return 2;
  int64_t calls, structure, bytes;
  take(in, &calls, 8);
  take(in, &structure, 8);
  if (structure != sizeof(Call)) return 3;
  for (; calls; --calls) {
    Call call;
    take(in, &call, sizeof call);
    take(in, &bytes, 8);
    char* memory = (char*)aligned_alloc(64, (bytes + 63) / 64 * 64);
    take(in, memory, bytes);
    place(call.query, memory), place(call.key, memory), place(call.value, memory);
    place(call.output, memory), place(call.lse, memory), place(call.mass, memory);
    place(call.q_starts, memory), place(call.q_lengths, memory);
    place(call.kv_starts, memory), place(call.kv_lengths, memory);
    place(call.kv_indices, memory), place(call.kv_num_blocks, memory);
    place(call.partial, memory), place(call.tiles, memory), place(call.log_weight, memory);
    place(call.q_permutation, memory), place(call.kv_permutation, memory);
    dit_sparse_work(&call);
    fwrite(&call.result, 1, 4, out);
    fwrite(memory, 1, bytes, out);
    free(memory);
  }
  return fclose(out) ? 2 : 0;
}
