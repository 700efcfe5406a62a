// One call as native.py describes it, field by field; strides count floats.
#pragma once

#include <cstdint>

struct Rows {  // vectors with adjacent features
  const float* data;
  int64_t batch, head, row;
};

struct Bias {  // data is null where there is none
  const float* data;
  int64_t batch, head, row, col;
};

struct Call {
  int64_t batch, heads, kv_heads, queries, keys, width, value_width, threads;
  Rows query, key, value;
  const int64_t *start, *stop;  // visible keys of each query
  int64_t interval_batch;       // stride of both; 0: shared
  const int64_t* real_before;   // real keys before each key [batch][keys + 1]; null: all are real
  int64_t real_batch;
  Bias bias;
  const float* sinks;
  float* output;  // [batch][heads][queries][value_width]
  float* lse;     // [batch][heads][queries]
  double scaling, softcap;  // softcap 0: none
};

struct Level {  // blocks of `side` queries by `key_side` keys; bitmaps have a bit per key block
  int64_t side, key_side, rows, cols, words;
  Rows query, key, value;  // block means
  Bias pair_bias, query_bias;
  const int64_t *n_queries, *n_keys, *entries;  // [batch][rows], [batch][cols], [batch][rows]
  const float* log_keys;                        // logarithm of n_keys; null: 0
  const int64_t *first_row, *first_col;         // first blocks with a real token [batch]
  uint64_t *open, *left;  // opened, and left at a pooled score [batch * heads][rows][words]
  double area;            // share of the legal entries that may be opened
  // Softmax over `left` per row of blocks, see Tile::part_of [batch * heads][rows][part_size].
  float* parts;
};

struct Choice {
  int64_t by_row_best, per_row, blocks_per_row, first_blocks, diagonal_blocks, offset, leave_none;
  const uint8_t* padding;  // rows of coarsest blocks without a real query [batch][rows]
};

struct Scratch {  // what is on offer of `heads` heads at a time
  void* offers;
  int64_t heads;
};

struct Tally {  // per head
  int64_t exact, forced, scored, left;
};

struct Estimate {  // see Directions in features.py; `wide` is the rank and zeros up to some lanes
  const float *to_query, *to_key;  // [batch * heads][width][wide]
  const float* mean;               // of all keys, in features [batch * heads][wide]
  const float* most;               // where features of keys are cut off [batch * heads]
  int64_t wide, fours, padded;     // `fours` features in fours; keys are padded to `padded`
  const uint8_t* hidden;           // padding among the keys [batch][padded]; null: none
  const uint8_t* counted;          // queries that speak for their block [batch][queries]
  const double* budgets;           // shares of the legal entries [heads]
  uint8_t* distances;              // scratch [heads_at_once][rows of blocks][padded]
  int64_t first_keys, heads_at_once;
};

static inline const float* row_of(const Rows& rows, int64_t b, int64_t h, int64_t i) {
  return rows.data + b * rows.batch + h * rows.head + i * rows.row;
}

static inline float bias_at(const Bias& bias, int64_t b, int64_t h, int64_t i, int64_t j) {
  return bias.data[b * bias.batch + h * bias.head + i * bias.row + j * bias.col];
}

// Real keys of [low, high) that query i of batch b may see.
static inline int64_t visible(const Call& call, int64_t b, int64_t i, int64_t low, int64_t high) {
  const int64_t start = call.start[b * call.interval_batch + i];
  const int64_t stop = call.stop[b * call.interval_batch + i];
  low = low > start ? low : start;
  high = high < stop ? high : stop;
  if (high <= low) return 0;
  if (!call.real_before) return high - low;
  const int64_t* before = call.real_before + b * call.real_batch;
  return before[high] - before[low];
}

// Bitmaps.
static inline void put(uint64_t* bits, int64_t i) { bits[i / 64] |= uint64_t{1} << (i % 64); }

static inline void put_all(uint64_t* bits, int64_t low, int64_t high) {
  for (; low < high && low % 64; ++low) put(bits, low);
  for (; low + 64 <= high; low += 64) bits[low / 64] = ~uint64_t{0};
  for (; low < high; ++low) put(bits, low);
}
