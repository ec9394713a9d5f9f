// SPDX-License-Identifier: Apache-2.0
// The kernel for one instruction set: compiled once for each, see build.json.
//
// A piece of work is one query block of one (sample, head). Its queries stand transposed in tiles of
// up to 4 vectors; up to TILES of them share each chunk of up to CHUNK keys, which is copied out of
// the plan's blocks as fp32 (so strides, permutations and 16-bit numbers cost one copy): keys as
// rows, values as panels of PANEL columns. Softmax is the online one.
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
#ifndef FLOATS
#define FLOATS 9216
#endif
constexpr int MOST = 4 * WIDTH;  // queries in a tile at most
constexpr float LARGEST = 1.44115188e17f;        // 2^57: no product of two such, summed, overflows
constexpr float LARGEST_VALUE = 1.26765060e30f;  // 2^100: nor a sum of such over all keys

// Registers: QV * R sums, and the R broadcasts or a part of them.
template <int QV> struct Rows;
#if WIDTH == 8 || (WIDTH == 16 && !defined(__AVX512F__))
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
  Call& call;
  int64_t query_at, key_at, value_at, output_at;  // first element
  const int32_t *q_starts, *q_lengths, *kv_starts, *kv_lengths, *indices, *counts, *partial;
  const int64_t *q_permutation, *kv_permutation;
  const float* log_weight;
  float *lse, *mass;
  int chunk;  // keys in a chunk

  Head(Call& c, int64_t b, int64_t h) : call(c) {
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
    chunk = c.head_dim * CHUNK > FLOATS ? (FLOATS / c.head_dim < 24 ? 24 : FLOATS / c.head_dim / 12 * 12) : CHUNK;
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
INLINE void copy(const Source* p, int64_t count, float* to, Convert convert) {
  int64_t e = 0;
  for (; e + WIDTH <= count; e += WIDTH) store(to + e, convert(p + e));
  if (e == count) return;
  Source rest[WIDTH] = {};
  std::memcpy(rest, p + e, (count - e) * sizeof(Source));
  const Vec x = convert(rest);
  std::memcpy(to + e, &x, (count - e) * sizeof(float));
}

// Copy numbers as fp32.
INLINE void read(const void* from, int64_t at, int32_t dtype, int64_t count, float* to) {
  if (dtype == FLOAT32)
    copy((const float*)from + at, count, to, [](const float* p) { return load(p); });
  else if (dtype == BFLOAT16)
    copy((const uint16_t*)from + at, count, to, [](const uint16_t* p) { return from_bfloat16(p); });
  else
    copy((const uint16_t*)from + at, count, to, [](const uint16_t* p) { return from_float16(p); });
}

// Whether all numbers are smaller than limit; nan and inf are not. As bits, sizes sort like numbers.
template <typename Source, typename Convert>
INLINE bool ordinary(const Source* p, int64_t count, float limit, Convert convert) {
  int32_t bits;
  std::memcpy(&bits, &limit, sizeof bits);
  const Int most = Int{} + bits;
  Int over = {};
  int64_t e = 0;
  for (; e + WIDTH <= count; e += WIDTH) over |= ((Int)convert(p + e) & 0x7fffffff) >= most;
  if (e < count) {
    Source rest[WIDTH] = {};
    std::memcpy(rest, p + e, (count - e) * sizeof(Source));
    over |= ((Int)convert(rest) & 0x7fffffff) >= most;
  }
  int32_t any = 0;
  for (int i = 0; i < WIDTH; i++) any |= over[i];
  return !any;
}

INLINE bool ordinary(const void* from, int64_t at, int32_t dtype, int64_t count, float limit) {
  if (dtype == FLOAT32)
    return ordinary((const float*)from + at, count, limit, [](const float* p) { return load(p); });
  if (dtype == BFLOAT16)
    return ordinary((const uint16_t*)from + at, count, limit, [](const uint16_t* p) { return from_bfloat16(p); });
  return ordinary((const uint16_t*)from + at, count, limit, [](const uint16_t* p) { return from_float16(p); });
}

// To nearest, ties to even; x is finite.
INLINE Half to_bfloat16(Vec x) {
  const Bits bits = (Bits)x;
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Half);
}

INLINE Half to_float16(Vec x) {
  const Bits sign = (Bits)x >> 16 & 0x8000, size = (Bits)x & 0x7fffffff;
  // Below 2^-14 a multiple of 2^-24: what is added to 1/2 is rounded to one.
  const Bits small = (Bits)((Vec)size + splat(0.5f)) - 0x3f000000;
  const Bits normal = (size + 0xfff + ((size >> 13) & 1) - 0x38000000) >> 13;
  const Bits over = (Bits)(size >= Bits{} + 0x477ff000), under = (Bits)(size < Bits{} + 0x38800000);
  const Bits value = (small & under) | (normal & ~under & ~over) | (over & 0x7c00);  // inf from 65520
  return __builtin_convertvector(value | sign, Half);
}

template <typename Number, typename Wide>
INLINE void write_some(Number* to, Wide x, int64_t count) {
  if (count >= WIDTH) std::memcpy(to, &x, sizeof x);
  else std::memcpy(to, &x, count * sizeof(Number));
}

// Round up to WIDTH numbers to a dtype and write them.
INLINE void write(void* to, int64_t at, int32_t dtype, Vec x, int64_t count) {
  if (dtype == FLOAT32) write_some((float*)to + at, x, count);
  else write_some((uint16_t*)to + at, dtype == BFLOAT16 ? to_bfloat16(x) : to_float16(x), count);
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
    while (entry < count && chunk.count < head.chunk) {
      const int64_t block = index ? index[entry] : entry, start = head.kv_starts[block], length = head.kv_lengths[block];
      const int32_t* tile = nullptr;
      if (partial && partial[entry] >= 0)
        tile = call.tiles + (partial[entry] * call.tile_rows + row) * call.tile_words;
      Segment& segment = chunk.segment[chunk.segments];
      segment.first = chunk.count;
      uint32_t live = 0;
      for (; column < length && chunk.count < head.chunk; column++) {
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
          weight = head.log_weight[slot];
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

// Asks the cache for the keys and values of the next chunk, some lines at a time, while this one is
// computed: asked for all at once they would keep others waiting.
struct Ahead {
  const Head& head;
  const Chunk& chunk;
  int64_t size, lines, step = 0;
  int key = 0;
  int64_t line = 0;

  Ahead(const Head& h, const Chunk& c, int64_t calls) : head(h), chunk(c), size(h.call.dtype == FLOAT32 ? 4 : 2) {
    lines = (h.call.head_dim * size + 63) / 64 + 1;  // a row may begin within a line
    step = (chunk.count * lines + calls - 1) / calls;
  }

  void more() {
    const Call& call = head.call;
    for (int64_t i = 0; i < step && key < chunk.count; i++) {
      const int64_t token = chunk.token[key] < 0 ? 0 : chunk.token[key];
      __builtin_prefetch((const char*)call.key + (head.key_at + token * call.key_strides[1]) * size + line * 64);
      if (call.value)
        __builtin_prefetch((const char*)call.value + (head.value_at + token * call.value_strides[1]) * size + line * 64);
      if (++line == lines) line = 0, key++;
    }
  }
};

// ---- scratch memory of one thread -------------------------------------------------------------

// Each array by itself, so that a sanitizer sees what reaches past its end.
class Array {
 public:
  explicit Array(int64_t floats) : memory(std::malloc(floats * sizeof(float) + 64)) {}
  Array(const Array&) = delete;
  ~Array() { std::free(memory); }
  explicit operator bool() const { return memory; }
  float* data() const { return (float*)(((uintptr_t)memory + 63) & ~(uintptr_t)63); }

 private:
  void* memory;
};

struct Room {
  static int64_t padded(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }
  // A row of vectors may reach behind head_dim: what is read there is not used.
  static int64_t wide(const Call& c) { return padded(c.head_dim) + WIDTH; }
  static int64_t blocks(const Call& c) { return c.mass ? c.kv_blocks : 0; }

  Array array[8];
  float *const queries, *const outputs;      // [TILES][head_dim][tile]
  float* const keys;                         // [CHUNK][head_dim]
  float* const values;                       // [panels][CHUNK][PANEL]
  float* const scores;                       // [CHUNK + R][tile]
  float* const rows;                         // [WIDTH][head_dim]
  float *const sums, *const bases;           // [TILES][kv_blocks][tile], where block mass is wanted
  const float* key[CHUNK];                   // where each key of the chunk stands

  explicit Room(const Call& c)
      : array{Array(TILES * wide(c) * MOST), Array(TILES * wide(c) * MOST), Array(CHUNK * c.head_dim),
              Array(CHUNK * padded(c.head_dim)), Array((CHUNK + PANEL) * MOST), Array(WIDTH * wide(c)),
              Array(TILES * blocks(c) * MOST), Array(TILES * blocks(c) * MOST)},
        queries(array[0].data()), outputs(array[1].data()), keys(array[2].data()), values(array[3].data()),
        scores(array[4].data()), rows(array[5].data()), sums(array[6].data()), bases(array[7].data()) {
    // Behind head_dim values stay 0.
    if (array[3]) std::memset(values, 0, CHUNK * padded(c.head_dim) * sizeof(float));
  }

  bool complete() const {
    for (const Array& each : array)
      if (!each) return false;
    return true;
  }
};

// ---- one piece of work ------------------------------------------------------------------------

template <int QV>
struct Tile {
  static constexpr int N = QV * WIDTH, R = Rows<QV>::R;
  Vec most[QV], base[QV];  // largest score so far, or the LSE given; the same times log2(e)
  Vec total[QV];           // of 2^(score log2(e) - base)
  int64_t token[N];
  int count;
};

INLINE float largest(const Call& call) {  // of a query
  const float scale = __builtin_fabsf(call.scale);
  return LARGEST / (scale > 1.0f ? scale : 1.0f);
}

template <int QV>
static void load_queries(const Head& head, int64_t slot, int count, Room& room, Tile<QV>& tile, float* queries) {
  constexpr int N = QV * WIDTH;
  Call& call = head.call;
  const int64_t d = call.head_dim, size = call.dtype == FLOAT32 ? 4 : 2;
  const Vec scale = splat(call.scale);
  tile.count = count;
  for (int i = 0; i < N; i++) {
    tile.token[i] = i >= count ? -1 : head.q_permutation ? head.q_permutation[slot + i] : slot + i;
    if (tile.token[i] < 0) continue;
    const char* row = (const char*)call.query + (head.query_at + tile.token[i] * call.query_strides[1]) * size;
    for (int64_t e = 0; e < d * size; e += 64) __builtin_prefetch(row + e);
  }
  const int64_t wide = Room::padded(d);
  for (int j = 0; j < QV; j++) {
    for (int i = 0; i < WIDTH; i++) {
      const int64_t token = tile.token[j * WIDTH + i];
      float* row = room.rows + i * wide;
      if (token < 0) std::memset(row, 0, d * sizeof(float));
      else {
        const int64_t at = head.query_at + token * call.query_strides[1];
        if (call.careful && !ordinary(call.query, at, call.dtype, d, largest(call)))
          __atomic_store_n(&call.stop, NOT_FINITE, __ATOMIC_RELAXED);
        read(call.query, at, call.dtype, d, row);
      }
    }
    for (int64_t e = 0; e < d; e += WIDTH) {
      Vec x[WIDTH];
      UNROLL for (int i = 0; i < WIDTH; i++) x[i] = load(room.rows + i * wide + e) * scale;
      transpose(x);
      UNROLL for (int i = 0; i < WIDTH; i++) if (e + i < d) store(queries + (e + i) * N + j * WIDTH, x[i]);
    }
    tile.most[j] = splat(MINUS_INF), tile.base[j] = tile.total[j] = splat(0.0f);
  }
}

static void load_keys(const Head& head, const Chunk& chunk, Room& room) {
  Call& call = head.call;
  const int64_t d = call.head_dim;
  for (int n = 0; n < chunk.count; n++) {
    const int64_t token = chunk.token[n] < 0 ? 0 : chunk.token[n];  // whose weight is -inf: any row will do
    const int64_t key = head.key_at + token * call.key_strides[1], value = head.value_at + token * call.value_strides[1];
    if (call.careful && chunk.token[n] >= 0 &&
        !(ordinary(call.key, key, call.dtype, d, LARGEST) &&
          (!call.value || ordinary(call.value, value, call.dtype, d, LARGEST_VALUE))))
      __atomic_store_n(&call.stop, NOT_FINITE, __ATOMIC_RELAXED);
    float* to = room.keys + n * d;
    room.key[n] = to;
    if (call.dtype == FLOAT32) room.key[n] = (const float*)call.key + key;
    else read(call.key, key, call.dtype, d, to);
    for (int64_t e = 0; e < d && call.value; e += PANEL)
      read(call.value, value + e, call.dtype, d - e < PANEL ? d - e : PANEL, room.values + n * PANEL + e * CHUNK);
  }
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
INLINE void score(const Room& room, const int32_t* which, int count, const float* queries, int64_t d,
                  Vec* most, Ahead& ahead) {
  constexpr int N = QV * WIDTH, R = Rows<QV>::R;
  for (int n = 0; n < count; n += R) {
    const float* keys[R];  // the last one over and over where fewer are left
    for (int i = 0; i < R; i++) keys[i] = room.key[which[n + i < count ? n + i : count - 1]];
    ahead.more();
    multiply_keys<R, QV>(keys, queries, d, room.scores + n * N, most);
  }
}

// Add the exponentials of each key block to its sums, which are relative to the base of their time.
template <int QV>
INLINE void add_to_blocks(const Chunk& chunk, Room& room, const int32_t* which, int count, const Vec* base, float* sums,
                          float* bases) {
  constexpr int N = QV * WIDTH;
  for (int n = 0, s = 0; n < count; s++) {
    Vec sum[QV] = {};
    for (; n < count && which[n] < chunk.segment[s].stop; n++)
      UNROLL for (int j = 0; j < QV; j++) sum[j] += load(room.scores + n * N + j * WIDTH);
    float* const to = sums + chunk.segment[s].block * N;
    float* const of = bases + chunk.segment[s].block * N;
    UNROLL for (int j = 0; j < QV; j++) {
      // 0 before the first: exp2 of 0 - base may be anything finite, times 0.
      const Vec before = load(to + j * WIDTH), was = load(of + j * WIDTH);
      const Vec kept = before == splat(0.0f) ? splat(0.0f) : before * exp2(was - base[j]);
      store(to + j * WIDTH, kept + sum[j]);
      store(of + j * WIDTH, base[j]);
    }
  }
}

// Block mass alone: the LSE is known.
template <int QV>
static void mass_chunk(const Chunk& chunk, Room& room, const Tile<QV>& tile, const float* queries, int64_t d, float* sums,
                       float* bases, Ahead& ahead) {
  constexpr int N = QV * WIDTH;
  int32_t which[CHUNK];
  for (int n = 0; n < chunk.count; n++) which[n] = n;
  Vec most[QV], base[QV] = {};
  UNROLL for (int j = 0; j < QV; j++) most[j] = splat(MINUS_INF);
  score<QV>(room, which, chunk.count, queries, d, most, ahead);
  for (int n = 0; n < chunk.count; n++)
    UNROLL for (int j = 0; j < QV; j++) {
      const Vec x = (load(room.scores + n * N + j * WIDTH) - tile.most[j]) * splat(LOG2_E);
      store(room.scores + n * N + j * WIDTH, exp2(x < splat(127.0f) ? x : splat(127.0f)));
    }
  add_to_blocks<QV>(chunk, room, which, chunk.count, base, sums, bases);
}

template <int QV>
static void store_mass(const Head& head, int64_t i_q, const Tile<QV>& tile, const float* sums, const float* bases) {
  constexpr int N = QV * WIDTH;
  const Call& call = head.call;
  for (int64_t block = 0; block < call.kv_blocks; block++) {
    float mass = 0.0f;
    for (int j = 0; j < QV; j++) {
      Vec sum = load(sums + block * N + j * WIDTH);
      if (call.value)
        sum = tile.total[j] > splat(0.0f)
            ? sum * exp2(load(bases + block * N + j * WIDTH) - tile.base[j]) / tile.total[j] : splat(0.0f);
      for (int i = 0; i < WIDTH; i++)
        if (j * WIDTH + i < tile.count && tile.token[j * WIDTH + i] >= 0) mass += sum[i];
    }
    head.mass[i_q * call.kv_blocks + block] += mass;
  }
}

template <int QV>
static void attend_chunk(const Head& head, const Chunk& chunk, int first, Room& room, Tile<QV>& tile,
                         const float* queries, float* output, float* sums, float* bases, Ahead& ahead) {
  constexpr int N = QV * WIDTH, R = Rows<QV>::R;
  const int64_t d = head.call.head_dim;
  int32_t which[CHUNK];
  int count = chunk.count;
  if (chunk.cut) count = live_keys<QV>(head.call, chunk, first, tile.count, which);
  else for (int n = 0; n < count; n++) which[n] = n;
  if (!count) return;
  Vec most[QV], fade[QV], base[QV];
  UNROLL for (int j = 0; j < QV; j++) most[j] = tile.most[j];
  score<QV>(room, which, count, queries, d, most, ahead);
  if (chunk.weighted || chunk.cut) {
    UNROLL for (int j = 0; j < QV; j++) most[j] = tile.most[j];
    adjust<QV>(head.call, chunk, first, tile.count, which, count, room.scores, most);
  }
  UNROLL for (int j = 0; j < QV; j++) {
    base[j] = most[j] == splat(MINUS_INF) ? splat(0.0f) : most[j] * splat(LOG2_E);
    // Exactly 1 while the base stays. Computed from the score instead, in a fused multiply-add, it
    // would hold the rounding of the base, and every chunk would add one more.
    fade[j] = tile.most[j] == splat(MINUS_INF) ? splat(0.0f) : exp2(tile.base[j] - base[j]);
    tile.most[j] = most[j], tile.base[j] = base[j];
    tile.total[j] *= fade[j];
  }
  Vec total[QV] = {};
  for (int n = 0; n < count; n++)
    UNROLL for (int j = 0; j < QV; j++) {
      const Vec x = exp2(load(room.scores + n * N + j * WIDTH) * splat(LOG2_E) - base[j]);
      store(room.scores + n * N + j * WIDTH, x);
      total[j] += x;
    }
  UNROLL for (int j = 0; j < QV; j++) tile.total[j] += total[j];
  if (head.mass) add_to_blocks<QV>(chunk, room, which, count, base, sums, bases);
  int64_t at[CHUNK];
  for (int n = 0; n < count; n++) at[n] = which[n] * PANEL;
  for (int64_t e = 0; e < d; e += R) {  // what stands behind head_dim is 0
    ahead.more();
    multiply_values<R, QV>(room.values + e / PANEL * (CHUNK * PANEL) + e % PANEL, at, count, room.scores, fade,
                           output + e * N);
  }
}

template <int QV>
static void store_output(const Head& head, const Tile<QV>& tile, const float* output) {
  constexpr int N = QV * WIDTH;
  const Call& call = head.call;
  for (int j = 0; j < QV && j * WIDTH < tile.count; j++) {
    const Vec inverse = tile.total[j] > splat(0.0f) ? splat(1.0f) / tile.total[j] : splat(0.0f);
    const int64_t* token = tile.token + j * WIDTH;
    for (int64_t e = 0; e < call.head_dim; e += WIDTH) {
      Vec x[WIDTH];
      UNROLL for (int i = 0; i < WIDTH; i++) x[i] = load(output + (e + i) * N + j * WIDTH) * inverse;
      transpose(x);
      for (int i = 0; i < WIDTH; i++)
        if (token[i] >= 0)
          write(call.output, head.output_at + token[i] * call.output_strides[1] + e, call.dtype, x[i], call.head_dim - e);
    }
    for (int i = 0; i < WIDTH; i++)
      if (token[i] >= 0)
        head.lse[token[i]] = tile.total[j][i] > 0.0f ? (float)(tile.base[j][i] * LN_2 + logf(tile.total[j][i])) : MINUS_INF;
  }
}

// Up to TILES tiles of one query block, against all keys that the block keeps.
template <int QV>
static void attend(const Head& head, int64_t i_q, int64_t row, int64_t queries, Room& room) {
  constexpr int N = QV * WIDTH;
  const Call& call = head.call;
  const int64_t d = call.head_dim, slot = head.q_starts[i_q] + row;
  Tile<QV> tile[TILES];
  const int tiles = (queries + N - 1) / N;
  for (int t = 0; t < tiles; t++) {
    const int count = queries - t * N < N ? queries - t * N : N;
    load_queries<QV>(head, slot + t * N, count, room, tile[t], room.queries + t * d * N);
  }
  const int64_t rows = Room::padded(d);
  std::memset(room.outputs, 0, tiles * rows * N * sizeof(float));
  const int64_t blocks = head.mass ? call.kv_blocks : 0;
  std::memset(room.sums, 0, tiles * blocks * N * sizeof(float));
  std::memset(room.bases, 0, tiles * blocks * N * sizeof(float));
  if (!call.value)  // the LSE is given; a row of which it is -inf counts nothing: exp(-inf)
    for (int t = 0; t < tiles; t++)
      for (int i = 0; i < tile[t].count; i++) {
        const float lse = tile[t].token[i] < 0 ? 0.0f : head.lse[tile[t].token[i]];
        tile[t].most[i / WIDTH][i % WIDTH] = lse == MINUS_INF ? -MINUS_INF : lse;
      }
  const int64_t list = i_q * call.cap;
  Walk walk{head, head.indices ? head.indices + list : nullptr, head.partial ? head.partial + list : nullptr,
            head.counts ? head.counts[i_q] : call.kv_blocks, row, queries};
  Chunk chunks[2];
  walk.next(chunks[0]);
  for (int now = 0; chunks[now].count; now ^= 1) {
    const Chunk& chunk = chunks[now];
    walk.next(chunks[now ^ 1]);
    constexpr int R = Tile<QV>::R;
    Ahead ahead(head, chunks[now ^ 1], tiles * ((chunk.count + R - 1) / R + (call.value ? (d + R - 1) / R : 0)));
    load_keys(head, chunk, room);
    for (int t = 0; t < tiles; t++) {
      const float* own = room.queries + t * d * N;
      float *sums = room.sums + t * blocks * N, *bases = room.bases + t * blocks * N;
      if (call.value)
        attend_chunk<QV>(head, chunk, t * N, room, tile[t], own, room.outputs + t * rows * N, sums, bases, ahead);
      else
        mass_chunk<QV>(chunk, room, tile[t], own, d, sums, bases, ahead);
    }
  }
  for (int t = 0; t < tiles; t++) {
    if (call.value) store_output<QV>(head, tile[t], room.outputs + t * rows * N);
    if (head.mass) store_mass<QV>(head, i_q, tile[t], room.sums + t * blocks * N, room.bases + t * blocks * N);
  }
}

static void attend_block(const Head& head, int64_t i_q, Room& room) {
  const int64_t length = head.q_lengths[i_q];
  for (int64_t row = 0; row < length;) {
    const int64_t left = length - row;
    const int64_t take = left < MOST ? left : (left / MOST < TILES ? left / MOST : TILES) * MOST;
    if (take <= WIDTH) attend<1>(head, i_q, row, take, room);
    else if (take <= 2 * WIDTH) attend<2>(head, i_q, row, take, room);
    else if (take <= 3 * WIDTH) attend<3>(head, i_q, row, take, room);
    else attend<4>(head, i_q, row, take, room);
    row += take;
  }
}

// Check a run of tokens of one sample: every number ordinary? A thread takes a run at a time.
static bool check(const Call& call, int64_t piece, int64_t runs) {
  const int64_t run = piece % runs, sample = piece / runs % call.batch;
  const struct { const void* data; const int64_t* strides; int64_t tokens; float limit; } sides[] = {
      {call.query, call.query_strides, call.tokens, largest(call)},
      {call.key, call.key_strides, call.kv_tokens, LARGEST},
      {call.value, call.value_strides, call.kv_tokens, LARGEST_VALUE}};
  for (const auto& side : sides) {
    if (!side.data) continue;
    const int64_t stop = side.tokens * (run + 1) / runs;
    for (int64_t head = 0; head < call.heads;) {
      // Heads side by side are one run of numbers.
      const int64_t together = side.strides[2] == call.head_dim ? call.heads : 1;
      for (int64_t token = side.tokens * run / runs; token < stop; token++)
        if (!ordinary(side.data, sample * side.strides[0] + token * side.strides[1] + head * side.strides[2],
                      call.dtype, together * call.head_dim, side.limit))
          return false;
      head += together;
    }
  }
  return true;
}

int32_t work(Call& call) {
  Room room(call);
  if (!room.complete()) return NO_MEMORY;
  const int64_t runs = (call.tokens + 255) / 256, checks = call.careful ? 0 : call.batch * runs;
  const int64_t total = checks + call.batch * call.heads * call.q_blocks;
  for (;;) {
    if (const int32_t why = __atomic_load_n(&call.stop, __ATOMIC_RELAXED)) return why;
    const int64_t next = __atomic_fetch_add(&call.next, 1, __ATOMIC_RELAXED) - checks;
    if (next >= total - checks) return __atomic_load_n(&call.stop, __ATOMIC_RELAXED);
    if (next < 0) {
      if (check(call, next + checks, runs)) continue;
      __atomic_store_n(&call.stop, NOT_FINITE, __ATOMIC_RELAXED);
      return NOT_FINITE;
    }
    const int64_t piece = call.order ? call.order[next] : next;
    const int64_t i_q = piece % call.q_blocks, head = piece / call.q_blocks;
    attend_block(Head(call, head / call.heads, head % call.heads), i_q, room);
  }
}

}  // namespace ISA
