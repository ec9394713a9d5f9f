// SPDX-License-Identifier: Apache-2.0
// One attention call as Python describes it. kernels/native.py holds the same structure: a change
// here is a change there, and a new ABI_VERSION.
#pragma once
#include <cstdint>

constexpr int ABI_VERSION = 2;

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Result : int32_t { DONE = 0, NOT_FINITE = 1, NO_MEMORY = 2, NO_INSTRUCTIONS = 3 };

// Tensors are [batch, tokens, heads, head_dim]; strides count elements, the last one is 1.
// *_lead are the leading sizes of a plan's tensor: 1, or batch and heads.
struct Call {
  const void *query, *key, *value;
  void* output;
  float* lse;   // [batch, heads, tokens]; block mass reads it, all else writes it
  float* mass;  // [batch, heads, q_blocks, kv_blocks] or null
  int64_t query_strides[3], key_strides[3], value_strides[3], output_strides[3];  // batch, token, head
  int64_t batch, heads, tokens, kv_tokens, head_dim;
  int64_t q_blocks, kv_blocks, cap, q_slots, kv_slots, tile_rows, tile_words;
  int64_t q_lead[2], kv_lead[2], list_lead[2], q_permutation_lead[2], kv_permutation_lead[2], weight_lead[2];
  const int32_t *q_starts, *q_lengths, *kv_starts, *kv_lengths;
  const int32_t *kv_indices, *kv_num_blocks, *partial, *tiles;
  const int64_t *q_permutation, *kv_permutation;
  const float* log_weight;
  const int64_t* order;  // of the work, or null: as it comes
  int64_t next;          // the first piece of work that no thread has taken
  int32_t dtype;
  int32_t stop;  // a thread found what the kernel cannot compute: a Result
  float scale;
  // 0: every number is checked first; 1: only what takes part is, where it is read. A call runs again
  // with 1 when a number was found that may not take part.
  int32_t careful;
  int32_t instruction_set;  // one bit of dit_sparse_instruction_sets
  int32_t result;           // what the threads found: a Result, DONE where all is well
};
