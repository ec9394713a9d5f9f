// SPDX-License-Identifier: Apache-2.0
// The kernel for one instruction set: compiled once for each, see build.json.
//
// A piece of work is one query block of one (sample, head). Its queries stand transposed in tiles of
// up to 4 vectors; up to TILES of them share each chunk of up to CHUNK keys, which is copied out of
// the plan's blocks as fp32 (so strides, permutations and 16-bit numbers cost one copy): keys as
// rows, values as panels of PANEL columns. Softmax is the online one, in powers of 2.
#include <cmath>
#include <cstdlib>

#include "call.h"
#include "vector.h"

namespace ISA {

#ifndef CHUNK
#define CHUNK 96  // likewise
#endif
#ifndef TILES
#define TILES 4
#endif
constexpr int PANEL = 24;  // a multiple of every R below
constexpr int MOST = 4 * WIDTH;  // queries in a tile at most
constexpr float LARGEST = 1.44115188e17f;        // 2^57: no product of two such, summed, overflows
constexpr float LARGEST_VALUE = 1.26765060e30f;  // 2^100: nor a sum of such over all keys

// Registers: QV * R sums, and the R broadcasts or a part of them.
template <int QV> struct Rows;
#if WIDTH == 8
template <> struct Rows<1> { static constexpr int R = 8; };
template <> struct Rows<2> { static constexpr int R = 6; };
template <> struct Rows<3> { static constexpr int R = 4; };
template <> struct Rows<4> { static constexpr int R = 3; };
#else
template <> struct Rows<1> { static constexpr int R = 12; };
template <> struct Rows<2> { static constexpr int R = 12; };
template <> struct Rows<3> { static constexpr int R = 8; };
template <> struct Rows<4> { static constexpr int R = 6; };
#endif

// ---- what a call holds for one (sample, head) -------------------------------------------------

INLINE int64_t lead(const int64_t* sizes, int64_t sample, int64_t head) {
  return (sample % sizes[0]) * sizes[1] + head % sizes[1];
}

template <typename T>
INLINE const T* of(const T* tensor, const int64_t* sizes, int64_t sample, int64_t head, int64_t length) {
  return tensor ? tensor + lead(sizes, sample, head) * length : nullptr;
}

struct Head {
  const Call& call;
  int64_t query_at, key_at, value_at, output_at;  // first element
  const int32_t *q_starts, *q_lengths, *kv_starts, *kv_lengths, *indices, *counts, *partial;
  const int64_t *q_permutation, *kv_permutation;
  const float* log_weight;
  float *lse, *mass;

  Head(const Call& c, int64_t b, int64_t h) : call(c) {
    query_at = b * c.query_strides[0] + h * c.query_strides[2];
    key_at = b * c.key_strides[0] + h * c.key_strides[2];
    value_at = b * c.value_strides[0] + h * c.value_strides[2];
    output_at = b * c.output_strides[0] + h * c.output_strides[2];
    q_starts = of(c.q_starts, c.q_lead, b, h, c.q_blocks);
    q_lengths = of(c.q_lengths, c.q_lead, b, h, c.q_blocks);
    kv_starts = of(c.kv_starts, c.kv_lead, b, h, c.kv_blocks);
    kv_lengths = of(c.kv_lengths, c.kv_lead, b, h, c.kv_blocks);
    indices = of(c.kv_indices, c.list_lead, b, h, c.q_blocks * c.cap);
    counts = of(c.kv_num_blocks, c.list_lead, b, h, c.q_blocks);
    partial = of(c.partial, c.list_lead, b, h, c.q_blocks * c.cap);
    q_permutation = of(c.q_permutation, c.q_permutation_lead, b, h, c.q_slots);
    kv_permutation = of(c.kv_permutation, c.kv_permutation_lead, b, h, c.kv_slots);
    log_weight = of(c.log_weight, c.weight_lead, b, h, c.kv_slots);
    lse = c.lse + (b * c.heads + h) * c.tokens;
    mass = c.mass ? c.mass + (b * c.heads + h) * c.q_blocks * c.kv_blocks : nullptr;
  }
};

// ---- reading numbers of any dtype -------------------------------------------------------------

INLINE Bits widen(const uint16_t* p) {
  Half x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Bits);
}

INLINE Vec from_bfloat16(const uint16_t* p) { return (Vec)(widen(p) << 16); }

INLINE Vec from_float16(const uint16_t* p) {
  const Bits x = widen(p);
  const Bits size = (x & 0x7fff) << 13;
  const Vec value = (Vec)size * splat(5.19229686e33f);  // 2^112: other bias; subnormals come right
  const Bits special = (Bits)(size >= (Bits{} + 0x0f800000)) & 0x7f800000;  // inf, nan -> inf
  return (Vec)((Bits)value | special | (x & 0x8000) << 16);
}

template <typename Source, typename Convert>
INLINE void copy(const Source* p, int64_t count, float* to, Int* peak, Convert convert) {
  int64_t e = 0;
  for (; e + WIDTH <= count; e += WIDTH) {
    const Vec x = convert(p + e);
    store(to + e, x);
    const Int size = (Int)x & 0x7fffffff;
    *peak = size > *peak ? size : *peak;
  }
  if (e == count) return;
  Source rest[WIDTH] = {};
  std::memcpy(rest, p + e, (count - e) * sizeof(Source));
  const Vec x = convert(rest);
  std::memcpy(to + e, &x, (count - e) * sizeof(float));
  const Int size = (Int)x & 0x7fffffff;
  *peak = size > *peak ? size : *peak;
}

// Copy numbers as fp32; peak is the largest size seen, as bits (nan and inf are the largest).
INLINE void read(const void* from, int64_t at, int32_t dtype, int64_t count, float* to, Int* peak) {
  if (dtype == FLOAT32)
    copy((const float*)from + at, count, to, peak, [](const float* p) { return load(p); });
  else if (dtype == BFLOAT16)
    copy((const uint16_t*)from + at, count, to, peak, [](const uint16_t* p) { return from_bfloat16(p); });
  else
    copy((const uint16_t*)from + at, count, to, peak, [](const uint16_t* p) { return from_float16(p); });
}

INLINE bool exceeds(const Int& peak, float limit) {
  int32_t bits;
  std::memcpy(&bits, &limit, sizeof bits);
  bool found = false;
  for (int i = 0; i < WIDTH; i++) found |= peak[i] >= bits;
  return found;
}

INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even; x is finite
}

INLINE uint16_t to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more: inf
  if (size < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
    float small;
    std::memcpy(&small, &size, sizeof small);
    small += 0.5f;  // rounds to a multiple of 2^-24
    uint32_t sum;
    std::memcpy(&sum, &small, sizeof sum);
    return sign | (sum - 0x3f000000);
  }
  return sign | ((size + 0xfff + ((size >> 13) & 1) - 0x38000000) >> 13);
}

// ---- one chunk of keys ------------------------------------------------------------------------

struct Segment {
  int first, stop;       // keys of the chunk
  int64_t block;         // key block
  const int32_t* tile;   // bits of the piece's first query, or null: all are kept
};

struct Chunk {
  int count, segments;
  bool weighted, cut;
  int64_t token[CHUNK];  // or -1: counts zero times
  float log_weight[CHUNK];
  int32_t column[CHUNK];  // within its block
  Segment segment[CHUNK];
};

// Walks over the keys that one query block keeps.
struct Walk {
  const Head& head;
  const int32_t *index, *partial;
  int64_t count, row, rows;  // row: of the piece's first query within its block
  int64_t entry = 0, column = 0;

  void next(Chunk& chunk) {
    const Call& call = head.call;
    chunk.count = chunk.segments = 0;
    chunk.weighted = chunk.cut = false;
    while (entry < count && chunk.count < CHUNK) {
      const int64_t block = index[entry], start = head.kv_starts[block], length = head.kv_lengths[block];
      const int32_t* tile = nullptr;
      if (partial && partial[entry] >= 0)
        tile = call.tiles + (partial[entry] * call.tile_rows + row) * call.tile_words;
      Segment& segment = chunk.segment[chunk.segments];
      segment.first = chunk.count;
      uint32_t live = 0;
      for (; column < length && chunk.count < CHUNK; column++) {
        if (tile) {
          if (column % 32 == 0 || chunk.count == segment.first) {
            live = 0;
            for (int64_t i = 0; i < rows; i++) live |= tile[i * call.tile_words + column / 32];
          }
          if (!(live >> (column % 32) & 1)) continue;
        }
        const int64_t slot = start + column;
        int64_t token = head.kv_permutation ? head.kv_permutation[slot] : slot;
        float weight = 0.0f;
        if (head.log_weight) {
          weight = head.log_weight[slot] * LOG2_E;
          if (weight == MINUS_INF) token = -1;
        }
        if (token < 0) weight = MINUS_INF;
        chunk.weighted |= weight != 0.0f;
        chunk.token[chunk.count] = token;
        chunk.log_weight[chunk.count] = weight;
        chunk.column[chunk.count++] = column;
      }
      if (column >= length) entry++, column = 0;
      if (chunk.count == segment.first) continue;
      segment.stop = chunk.count;
      segment.block = block;
      segment.tile = tile;
      chunk.cut |= tile != nullptr;
      chunk.segments++;
    }
  }
};

// ---- scratch memory of one thread -------------------------------------------------------------

struct Room {
  float *queries, *outputs;  // [TILES][head_dim][tile]
  float* keys;               // [CHUNK][head_dim]
  float* values;             // [panels][CHUNK][PANEL]
  float* scores;             // [CHUNK + R][tile]
  float* row;                // [head_dim]
  float *sums, *bases;       // [kv_blocks][tile], where block mass is wanted
  void* memory;

  static int64_t padded(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

  explicit Room(const Call& c) {
    const int64_t d = padded(c.head_dim), blocks = c.mass ? c.kv_blocks : 0;
    const int64_t sizes[] = {TILES * d * MOST, TILES * d * MOST, CHUNK * d, CHUNK * d,
                             (CHUNK + PANEL) * MOST, d,              blocks * MOST * TILES, blocks * MOST * TILES};
    int64_t total = 16;
    for (int64_t size : sizes) total += size;
    memory = std::malloc(total * sizeof(float));
    float* at = (float*)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    float** const to[] = {&queries, &outputs, &keys, &values, &scores, &row, &sums, &bases};
    if (!memory) return;
    for (int i = 0; i < 8; i++) *to[i] = at, at += sizes[i];
    std::memset(values, 0, CHUNK * d * sizeof(float));
  }
  Room(const Room&) = delete;
  ~Room() { std::free(memory); }
};

// ---- one piece of work ------------------------------------------------------------------------

template <int QV>
struct Tile {
  static constexpr int N = QV * WIDTH, R = Rows<QV>::R;
  Vec most[QV], total[QV];  // of the scores so far, in powers of 2; of their exponentials
  int64_t token[N];
  int count;
};

template <int QV>
static bool load_queries(const Head& head, int64_t slot, int count, Room& room, Tile<QV>& tile, float* queries) {
  constexpr int N = QV * WIDTH;
  const Call& call = head.call;
  const int64_t d = call.head_dim;
  const float scale = call.scale * LOG2_E;
  Int peak = {};
  tile.count = count;
  for (int i = 0; i < N; i++) {
    tile.token[i] = i >= count ? -1 : head.q_permutation ? head.q_permutation[slot + i] : slot + i;
    if (tile.token[i] < 0)
      std::memset(room.row, 0, d * sizeof(float));
    else
      read(call.query, head.query_at + tile.token[i] * call.query_strides[1], call.dtype, d, room.row, &peak);
    for (int64_t e = 0; e < d; e++) queries[e * N + i] = room.row[e] * scale;
  }
  UNROLL for (int j = 0; j < QV; j++) tile.most[j] = splat(MINUS_INF), tile.total[j] = splat(0.0f);
  const float largest = LARGEST / (std::fabs(scale) > 1.0f ? std::fabs(scale) : 1.0f);
  return !exceeds(peak, largest);
}

static bool load_keys(const Head& head, const Chunk& chunk, Room& room) {
  const Call& call = head.call;
  const int64_t d = call.head_dim;
  Int key_peak = {}, value_peak = {};
  for (int n = 0; n < chunk.count; n++) {
    const int64_t token = chunk.token[n];
    float* key = room.keys + n * d;
    float* value = room.values + n * PANEL;
    if (token < 0) {
      std::memset(key, 0, d * sizeof(float));
      for (int64_t e = 0; e < d; e += PANEL) std::memset(value + e * CHUNK, 0, PANEL * sizeof(float));
      continue;
    }
    read(call.key, head.key_at + token * call.key_strides[1], call.dtype, d, key, &key_peak);
    const int64_t at = head.value_at + token * call.value_strides[1];
    for (int64_t e = 0; e < d; e += PANEL)
      read(call.value, at + e, call.dtype, d - e < PANEL ? d - e : PANEL, value + e * CHUNK, &value_peak);
  }
  return !exceeds(key_peak, LARGEST) && !exceeds(value_peak, LARGEST_VALUE);
}

// The keys of a chunk that any query of a tile keeps.
template <int QV>
INLINE int live_keys(const Call& call, const Chunk& chunk, int first, int count, int32_t* which) {
  int found = 0;
  for (int s = 0; s < chunk.segments; s++) {
    const Segment& segment = chunk.segment[s];
    int64_t word = -1;
    uint32_t live = ~0u;
    for (int n = segment.first; n < segment.stop; n++) {
      if (segment.tile && chunk.column[n] / 32 != word) {
        word = chunk.column[n] / 32;
        live = 0;
        for (int i = 0; i < count; i++) live |= segment.tile[(first + i) * call.tile_words + word];
      }
      if (!segment.tile || (live >> chunk.column[n] % 32 & 1)) which[found++] = n;
    }
  }
  return found;
}

// Add log weights, and -inf where bits drop a pair; find the largest scores anew.
template <int QV>
INLINE void adjust(const Call& call, const Chunk& chunk, int first, int queries, const int32_t* which, int count,
                   float* scores, Vec* most) {
  constexpr int N = QV * WIDTH;
  int s = 0;
  int64_t word = -1;
  Bits lanes[QV] = {};
  for (int n = 0; n < count; n++) {
    const int key = which[n];
    while (key >= chunk.segment[s].stop) s++, word = -1;
    const Segment& segment = chunk.segment[s];
    const Vec weight = splat(chunk.log_weight[key]);
    if (segment.tile && chunk.column[key] / 32 != word) {
      word = chunk.column[key] / 32;
      uint32_t bits[N] = {};
      for (int i = 0; i < queries; i++) bits[i] = segment.tile[(first + i) * call.tile_words + word];
      std::memcpy(lanes, bits, sizeof bits);
    }
    const int up = 31 - chunk.column[key] % 32;  // brings the key's bit to the sign
    UNROLL for (int j = 0; j < QV; j++) {
      Vec x = load(scores + n * N + j * WIDTH) + weight;
      if (segment.tile) x = (Int)(lanes[j] << up) < 0 ? x : splat(MINUS_INF);
      store(scores + n * N + j * WIDTH, x);
      most[j] = maximum(most[j], x);
    }
  }
}

template <int QV>
static void attend_chunk(const Head& head, const Chunk& chunk, int first, Room& room, Tile<QV>& tile,
                         const float* queries, float* output) {
  constexpr int N = QV * WIDTH, R = Rows<QV>::R;
  const int64_t d = head.call.head_dim;
  int32_t which[CHUNK];
  int count = chunk.count;
  if (chunk.cut) count = live_keys<QV>(head.call, chunk, first, tile.count, which);
  else for (int n = 0; n < count; n++) which[n] = n;
  if (!count) return;
  Vec most[QV], fade[QV], base[QV];
  UNROLL for (int j = 0; j < QV; j++) most[j] = tile.most[j];
  for (int n = 0; n < count; n += R) {
    const float* keys[R];  // the last one over and over where fewer are left
    for (int i = 0; i < R; i++) keys[i] = room.keys + which[n + i < count ? n + i : count - 1] * d;
    multiply_keys<R, QV>(keys, queries, d, room.scores + n * N, most);
  }
  if (chunk.weighted || chunk.cut) {
    UNROLL for (int j = 0; j < QV; j++) most[j] = tile.most[j];
    adjust<QV>(head.call, chunk, first, tile.count, which, count, room.scores, most);
  }
  UNROLL for (int j = 0; j < QV; j++) {
    base[j] = most[j] == splat(MINUS_INF) ? splat(0.0f) : most[j];
    fade[j] = exp2(tile.most[j] - base[j]);
    tile.most[j] = most[j];
    tile.total[j] *= fade[j];
  }
  Vec total[QV];
  UNROLL for (int j = 0; j < QV; j++) total[j] = tile.total[j];
  for (int n = 0; n < count; n++)
    UNROLL for (int j = 0; j < QV; j++) {
      const Vec x = exp2(load(room.scores + n * N + j * WIDTH) - base[j]);
      store(room.scores + n * N + j * WIDTH, x);
      total[j] += x;
    }
  UNROLL for (int j = 0; j < QV; j++) tile.total[j] = total[j];
  for (int64_t e = 0; e < d; e += R)  // what stands behind head_dim is 0
    multiply_values<R, QV>(room.values + e / PANEL * (CHUNK * PANEL) + e % PANEL, PANEL, which, count, room.scores,
                           fade, output + e * N);
}

template <int QV>
static void store_output(const Head& head, const Tile<QV>& tile, const float* output) {
  constexpr int N = QV * WIDTH;
  const Call& call = head.call;
  for (int i = 0; i < tile.count; i++) {
    const int64_t token = tile.token[i];
    if (token < 0) continue;
    const float total = tile.total[i / WIDTH][i % WIDTH], most = tile.most[i / WIDTH][i % WIDTH];
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const int64_t at = head.output_at + token * call.output_strides[1];
    const float* column = output + i;
    if (call.dtype == FLOAT32)
      for (int64_t e = 0; e < call.head_dim; e++) ((float*)call.output)[at + e] = column[e * N] * inverse;
    else if (call.dtype == BFLOAT16)
      for (int64_t e = 0; e < call.head_dim; e++) ((uint16_t*)call.output)[at + e] = to_bfloat16(column[e * N] * inverse);
    else
      for (int64_t e = 0; e < call.head_dim; e++) ((uint16_t*)call.output)[at + e] = to_float16(column[e * N] * inverse);
    head.lse[token] = total > 0.0f ? most * LN_2 + logf(total) : MINUS_INF;
  }
}

// Up to TILES tiles of one query block, against all keys that the block keeps.
template <int QV>
static bool attend(const Head& head, int64_t i_q, int64_t row, int64_t queries, Room& room) {
  constexpr int N = QV * WIDTH;
  const Call& call = head.call;
  const int64_t d = call.head_dim, slot = head.q_starts[i_q] + row;
  Tile<QV> tile[TILES];
  const int tiles = (queries + N - 1) / N;
  for (int t = 0; t < tiles; t++) {
    const int count = queries - t * N < N ? queries - t * N : N;
    if (!load_queries<QV>(head, slot + t * N, count, room, tile[t], room.queries + t * d * N)) return false;
  }
  const int64_t rows = Room::padded(d);
  std::memset(room.outputs, 0, tiles * rows * N * sizeof(float));
  const int64_t list = i_q * call.cap;
  Walk walk{head, head.indices + list, head.partial ? head.partial + list : nullptr, head.counts[i_q], row, queries};
  Chunk chunk;
  for (walk.next(chunk); chunk.count; walk.next(chunk)) {
    if (!load_keys(head, chunk, room)) return false;
    for (int t = 0; t < tiles; t++)
      attend_chunk<QV>(head, chunk, t * N, room, tile[t], room.queries + t * d * N, room.outputs + t * rows * N);
  }
  for (int t = 0; t < tiles; t++) store_output<QV>(head, tile[t], room.outputs + t * rows * N);
  return true;
}

static bool attend_block(const Head& head, int64_t i_q, Room& room) {
  const int64_t length = head.q_lengths[i_q];
  for (int64_t row = 0; row < length;) {
    const int64_t left = length - row;
    const int64_t take = left < MOST ? left : (left / MOST < TILES ? left / MOST : TILES) * MOST;
    bool fine;
    if (take <= WIDTH) fine = attend<1>(head, i_q, row, take, room);
    else if (take <= 2 * WIDTH) fine = attend<2>(head, i_q, row, take, room);
    else if (take <= 3 * WIDTH) fine = attend<3>(head, i_q, row, take, room);
    else fine = attend<4>(head, i_q, row, take, room);
    if (!fine) return false;
    row += take;
  }
  return true;
}

int32_t work(Call& call) {
  Room room(call);
  if (!room.memory) return NO_MEMORY;
  const int64_t total = call.batch * call.heads * call.q_blocks;
  for (;;) {
    if (__atomic_load_n(&call.stop, __ATOMIC_RELAXED)) return NOT_FINITE;
    const int64_t next = __atomic_fetch_add(&call.next, 1, __ATOMIC_RELAXED);
    if (next >= total) return DONE;
    const int64_t piece = call.order ? call.order[next] : next;
    const int64_t i_q = piece % call.q_blocks, head = piece / call.q_blocks;
    if (!attend_block(Head(call, head / call.heads, head % call.heads), i_q, room)) {
      __atomic_store_n(&call.stop, NOT_FINITE, __ATOMIC_RELAXED);
      return NOT_FINITE;
    }
  }
}

}  // namespace ISA
