// Estimated logits: from a few features of queries and keys in bytes, as features.py says.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "call.h"
#include "lanes.h"

namespace {

constexpr int FARTHEST = 127, ROWS = 4, GROUP = 4;  // queries, and registers of keys, at a time
constexpr int64_t KEYS = GROUP * LANES;
constexpr int64_t CHUNK = 64, CLOSE = 32, APART = 8;  // see _log_weights in keys.py
constexpr float STEPS_PER_NAT = 8;
constexpr float QUERY_LEVELS = 127, KEY_LEVELS = 63, LEAST_UNIT = 1e-4f;
constexpr int32_t KEY_ZERO = 64, LEAST = -(1 << 30);  // keys are so much above what they mean
constexpr double MOST_UNITS = 1 << 28;

inline int64_t down(int64_t x, int64_t to) { return (x >= 0 ? x : x - to + 1) / to * to; }
inline int64_t up(int64_t x, int64_t to) { return down(x + to - 1, to); }
// An odd number of CHUNKs: rows that lie a power of two apart push each other out of a cache.
inline int64_t odd_groups(int64_t x) { return (up(x, CHUNK) / CHUNK | 1) * CHUNK; }

// Keys that some row of a block sees, and those that all rows with keys to see do.
struct Reach {
  int64_t any_low, any_high, all_low, all_high, live = 0;

  Reach(const Call& call, int64_t b, int64_t first, int64_t end)
      : any_low(call.keys), any_high(0), all_low(0), all_high(call.keys) {
    for (int64_t i = first; i < end; ++i) {
      const int64_t low = call.start[b * call.interval_batch + i];
      const int64_t high = call.stop[b * call.interval_batch + i];
      if (visible(call, b, i, 0, call.keys) == 0) continue;
      any_low = std::min(any_low, low);
      any_high = std::max(any_high, high);
      all_low = std::max(all_low, low);
      all_high = std::min(all_high, high);
      ++live;
    }
    if (!live) any_low = any_high = all_low = all_high = 0;
    all_high = std::max(all_low, all_high);
  }
};

// Some keys [begin, end) of one head, `step` apart, and where their scores go.
struct Segment {
  const uint8_t* keys;
  int64_t padded, step, begin, end, place;
};

// The queries that speak for a block; a multiple of ROWS, the last as often as need be.
struct Speakers {
  float unit = 0;  // nats that their products count in
  std::vector<int64_t> queries;
  std::vector<const int8_t*> bytes;
  std::vector<int32_t> zero;  // what their products start from
  std::vector<float> features, scores;
  std::vector<int8_t> own_bytes;

  void add(int64_t query, const int8_t* its_bytes, int32_t its_zero) {
    queries.push_back(query);
    bytes.push_back(its_bytes);
    zero.push_back(its_zero);
  }
};

// The keys of one head: four features next to each other, then keys, then the other features.
struct KeyBytes {
  std::vector<uint8_t> all, some;  // some: every APARTth
  int64_t padded, some_padded;
  float step;  // that their features are multiples of
};

// Leading features of ROWS tokens (the last as often as need be) -> [ROWS][wide].
inline void project(const Rows& tokens, int64_t b, int64_t h, int64_t first, int64_t end,
                    int64_t width, const float* directions, int64_t wide, float* out) {
  const float* token[ROWS];
  for (int r = 0; r < ROWS; ++r) token[r] = row_of(tokens, b, h, std::min(first + r, end - 1));
  for (int64_t c = 0; c < wide; c += LANES) {
    Lanes sums[ROWS] = {};
    for (int64_t d = 0; d < width; ++d) {
      const Lanes weights = at(directions + d * wide + c);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[r] += weights * token[r][d];
    }
    for (int r = 0; r < ROWS; ++r) at(out + r * wide + c) = sums[r];
  }
}

// Whole numbers nearest to `x`, of less than 2^22; ties to even.
inline Ints rounded(const Lanes& x) { return (Ints)(x + 12582912.0f) - 0x4B400000; }

struct Estimator {
  const Call& call;
  const Level& level;
  const Estimate& estimate;
  int64_t first_head;
  std::vector<KeyBytes> of_keys;  // of first_head and those after it

  bool hidden(int64_t b, int64_t key) const {
    return estimate.hidden && estimate.hidden[b * estimate.padded + key] != 0;
  }

  // Features of the keys of a head. Padding has none.
  KeyBytes bytes_of_keys(int64_t head) const {
    const int64_t b = head / call.heads, h = head % call.heads / (call.heads / call.kv_heads);
    const float* directions = estimate.to_key + head * call.width * estimate.wide;
    const float* mean = estimate.mean + head * estimate.wide;
    const int64_t wide = estimate.wide, fours = estimate.fours;
    std::vector<float> features(up(call.keys, ROWS) * wide);
    Lanes most = {};
    for (int64_t j = 0; j < call.keys; j += ROWS) {
      float* own = features.data() + j * wide;
      project(call.key, b, h, j, call.keys, call.width, directions, wide, own);
      for (int64_t i = 0; i < ROWS; ++i)
        for (int64_t c = 0; c < wide; c += LANES) {
          Lanes& some = at(own + i * wide + c);
          some = j + i < call.keys && hidden(b, j + i) ? Lanes{} : some - at(mean + c);
          most = larger(most, larger(some, -some));
        }
    }
    float largest = 0;
    for (int i = 0; i < LANES; ++i) largest = std::max(largest, most[i]);
    largest = std::max(std::min(largest, estimate.most[head]), 1e-20f);
    KeyBytes keys = {{}, {}, estimate.padded, odd_groups(up(call.keys, APART) / APART),
                     largest / KEY_LEVELS};
    keys.all.resize(fours * keys.padded * 4);
    keys.some.resize(fours * keys.some_padded * 4);
    for (int64_t j = 0; j < call.keys; ++j)
      for (int64_t c = 0; c < fours * 4; c += LANES) {
        const Lanes levels = at(features.data() + j * wide + c) / keys.step;
        const Lanes least = all(-KEY_LEVELS), held = larger(-larger(-levels, least), least);
        const Ints whole = rounded(held) + KEY_ZERO;
        uint8_t bytes[LANES];
        for (int i = 0; i < LANES; ++i) bytes[i] = static_cast<uint8_t>(whole[i]);
        for (int64_t four = c / 4; four < std::min(fours, (c + LANES) / 4); ++four) {
          std::memcpy(&keys.all[(four * keys.padded + j) * 4], bytes + four * 4 - c, 4);
          if (j % APART == 0)
            std::memcpy(&keys.some[(four * keys.some_padded + j / APART) * 4],
                        bytes + four * 4 - c, 4);
        }
      }
    return keys;
  }

  // Features of the queries that speak for a block.
  void bytes_of_queries(int64_t head, int64_t row, float key_step, Speakers& to) const {
    const int64_t b = head / call.heads, first = row * level.side, wide = estimate.wide;
    const int64_t end = std::min(first + level.side, call.queries);
    to.features.resize(up(level.side, ROWS) * wide);
    to.own_bytes.resize(level.side * wide);
    Lanes most = {};
    for (int64_t i = first; i < end; i += ROWS) {
      float* own = to.features.data() + (i - first) * wide;
      project(call.query, b, head % call.heads, i, end, call.width,
              estimate.to_query + head * call.width * wide, wide, own);
      for (int64_t r = 0; r < std::min<int64_t>(ROWS, end - i); ++r)
        for (int64_t c = 0; estimate.counted[b * call.queries + i + r] && c < wide; c += LANES) {
          const Lanes some = at(own + r * wide + c);
          most = larger(most, larger(some, -some));
        }
    }
    float largest = 0;
    for (int i = 0; i < LANES; ++i) largest = std::max(largest, most[i]);
    to.unit = std::max(largest * key_step / QUERY_LEVELS, LEAST_UNIT);
    to.queries.clear();
    to.bytes.clear();
    to.zero.clear();
    for (int64_t i = first; i < end; ++i) {
      const bool counted = estimate.counted[b * call.queries + i];
      if (!counted || visible(call, b, i, 0, call.keys) == 0) continue;
      int8_t* bytes = to.own_bytes.data() + (i - first) * wide;
      int32_t sum = 0;
      for (int64_t c = 0; c < wide; c += LANES) {
        const float* own = to.features.data() + (i - first) * wide + c;
        const Ints whole = rounded(at(own) * (key_step / to.unit));
        for (int lane = 0; lane < LANES; ++lane) {
          bytes[c + lane] = static_cast<int8_t>(whole[lane]);
          sum += whole[lane];
        }
      }
      to.add(i, bytes, -KEY_ZERO * sum);
    }
    while (to.queries.size() % ROWS) to.add(to.queries.back(), to.bytes.back(), to.zero.back());
  }

  // Products of ROWS queries with KEYS keys from `j` on, added to `sums`.
  void multiply(const uint8_t* keys, int64_t padded, int64_t j, const int8_t* const* query,
                Ints (&sums)[ROWS][GROUP]) const {
    for (int64_t four = 0; four < estimate.fours; ++four) {
      const uint8_t* some = keys + (four * padded + j) * 4;
      int32_t bytes[ROWS];
      for (int r = 0; r < ROWS; ++r) std::memcpy(&bytes[r], query[r] + four * 4, 4);
#pragma GCC unroll 4
      for (int g = 0; g < GROUP; ++g) {
        const Ints lanes = *reinterpret_cast<const Ints*>(some + g * LANES * 4);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sums[r][g] = add_products(sums[r][g], lanes, bytes[r]);
      }
    }
  }

  // The queries of a block that speak for it, and what their log-sum-exps take off their products.
  void normalise(int64_t head, int64_t row, const Reach& reach, Speakers& to) const {
    const int64_t first = row * level.side;
    const KeyBytes& keys = of_keys[head - first_head];
    bytes_of_queries(head, row, keys.step, to);
    std::vector<Segment> segments = close_by(keys, head, first, first + level.side);
    segments.push_back(all_over(keys, reach));
    int64_t capacity = 0;
    for (Segment& each : segments) {
      each.place = capacity;
      capacity += each.end - each.begin;
    }
    to.scores.resize(ROWS * capacity);
    for (size_t i = 0; i < to.queries.size(); i += ROWS) {
      for (const Segment& each : segments)
        for (int64_t j = each.begin; j < each.end; j += KEYS) {
          Ints sums[ROWS][GROUP];
          for (int r = 0; r < ROWS; ++r)
            for (int g = 0; g < GROUP; ++g) sums[r][g] = all_ints(to.zero[i + r]);
          multiply(each.keys, each.padded, j, &to.bytes[i], sums);
          for (int r = 0; r < ROWS; ++r)
            for (int g = 0; g < GROUP; ++g)
              at(to.scores.data() + r * capacity + each.place + j - each.begin + g * LANES) =
                  __builtin_convertvector(sums[r][g], Lanes) * to.unit;
        }
      for (int r = 0; r < ROWS; ++r) {
        float* scores = to.scores.data() + r * capacity;
        for (const Segment& each : segments) blank(each, segments, head, to.queries[i + r], scores);
        const float lse = log_sum(scores, segments.back().place, capacity);
        const double units = std::clamp<double>(lse / to.unit, -MOST_UNITS, MOST_UNITS);
        to.zero[i + r] =
            lse == NONE ? LEAST : to.zero[i + r] - static_cast<int32_t>(std::lround(units));
      }
    }
  }

  // Keys that count singly: those around the diagonal, and the first ones.
  std::vector<Segment> close_by(const KeyBytes& keys, int64_t head, int64_t first,
                                int64_t end) const {
    const int64_t diagonal = call.keys - call.queries, all = up(call.keys, CHUNK);
    const int64_t low = std::clamp(down(first + diagonal - CLOSE, CHUNK), int64_t{0}, all);
    const int64_t high = std::clamp(up(end + diagonal + CLOSE, CHUNK), int64_t{0}, all);
    const int64_t front = down(level.first_col[head / call.heads], CHUNK);
    std::vector<Segment> segments;
    if (front < low || front >= high)
      segments.push_back({keys.all.data(), keys.padded, 1, front, front + CHUNK, 0});
    segments.push_back({keys.all.data(), keys.padded, 1, low, std::max(low, high), 0});
    return segments;
  }

  // Every so many-th key of those that some query sees.
  Segment all_over(const KeyBytes& keys, const Reach& reach) const {
    return {keys.some.data(), keys.some_padded, APART,
            down(reach.any_low / APART, KEYS), up(up(reach.any_high, APART) / APART, KEYS), 0};
  }

  // NONE for what a query doesn't see, and for what counts singly; bias for the rest.
  void blank(const Segment& segment, const std::vector<Segment>& segments, int64_t head,
             int64_t query, float* scores) const {
    const int64_t b = head / call.heads, h = head % call.heads, step = segment.step;
    float* out = scores + segment.place;
    const auto none = [&](int64_t low, int64_t high) {  // keys of [low, high)
      low = std::clamp(up(low, step) / step, segment.begin, segment.end);
      high = std::clamp(up(high, step) / step, segment.begin, segment.end);
      if (low < high) std::fill(out + low - segment.begin, out + high - segment.begin, NONE);
    };
    for (int64_t j = segment.begin; estimate.hidden && j < segment.end && j * step < call.keys; ++j)
      if (hidden(b, j * step)) out[j - segment.begin] = NONE;
    for (int64_t j = segment.begin; call.bias.data && j < segment.end && j * step < call.keys; ++j)
      out[j - segment.begin] += bias_at(call.bias, b, h, query, j * step);
    none(0, call.start[b * call.interval_batch + query]);
    none(call.stop[b * call.interval_batch + query], segment.end * step);
    for (const Segment& single : segments)
      if (step > 1 && single.step == 1) none(single.begin, single.end);
  }

  // Of the scores below `singly`, and APART times those from there on.
  static float log_sum(const float* scores, int64_t singly, int64_t all_of) {
    Lanes peaks = all(NONE), once = {}, often = {};
    for (int64_t j = 0; j < all_of; j += LANES) peaks = larger(peaks, at(scores + j));
    float peak = NONE, total = 0;
    for (int i = 0; i < LANES; ++i) peak = std::max(peak, peaks[i]);
    if (peak == NONE) return NONE;
    for (int64_t j = 0; j < singly; j += LANES) once += roughly_exp(at(scores + j) - peak);
    for (int64_t j = singly; j < all_of; j += LANES) often += roughly_exp(at(scores + j) - peak);
    for (int i = 0; i < LANES; ++i) total += once[i] + APART * often[i];
    return peak + std::log(total);
  }

  // Steps that each key that all queries see is away from the nearest of them.
  template <bool BIASED>
  void measure(int64_t head, const Reach& reach, const Speakers& from,
               uint8_t* distances) const {
    const KeyBytes& keys = of_keys[head - first_head];
    const float unit = from.unit;
    for (int64_t j = down(reach.all_low, KEYS); j < reach.all_high; j += KEYS) {
      Ints nearest[GROUP];
      for (int g = 0; g < GROUP; ++g) nearest[g] = all_ints(LEAST);
      for (size_t i = 0; i < from.queries.size(); i += ROWS) {
        Ints sums[ROWS][GROUP];
        for (int r = 0; r < ROWS; ++r)
          for (int g = 0; g < GROUP; ++g) {
            sums[r][g] = all_ints(from.zero[i + r]);
            if (BIASED) sums[r][g] += bias_in_units(head, from.queries[i + r], j + g * LANES, unit);
          }
        multiply(keys.all.data(), keys.padded, j, &from.bytes[i], sums);
        for (int g = 0; g < GROUP; ++g)
          for (int r = 0; r < ROWS; ++r)
            nearest[g] = nearest[g] > sums[r][g] ? nearest[g] : sums[r][g];
      }
      for (int g = 0; g < GROUP; ++g) {
        const Lanes away = __builtin_convertvector(nearest[g], Lanes) * (-STEPS_PER_NAT * unit);
        const Lanes held = larger(-larger(-away, all(1 - FARTHEST)), Lanes{});
        typedef uint8_t Bytes __attribute__((vector_size(LANES)));
        const Bytes bytes =
            __builtin_convertvector(__builtin_convertvector(held, Ints) + 1, Bytes);
        std::memcpy(distances + j + g * LANES, &bytes, LANES);
      }
    }
  }

  Ints bias_in_units(int64_t head, int64_t query, int64_t first_key, float unit) const {
    const int64_t b = head / call.heads, h = head % call.heads;
    Ints units = {};
    for (int i = 0; i < LANES && first_key + i < call.keys; ++i) {
      const double bias = bias_at(call.bias, b, h, query, first_key + i) / unit;
      units[i] = static_cast<int32_t>(std::lround(std::clamp(bias, -MOST_UNITS, MOST_UNITS)));
    }
    return units;
  }
};

}  // namespace
