// Exact attention over opened blocks merged with the coarse term, LANES query rows at a time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "call.h"
#include "lanes.h"

namespace {

constexpr int BATCH = 128;  // keys whose logits are held before the running softmax moves on

// The keys of one batch: where they are, which lanes they are for, what is added to their logits.
struct Batch {
  int n = 0;
  bool whole = true;  // every lane sees every key
  const float *key[BATCH], *value[BATCH];
  float added[BATCH];
  uint32_t lanes[BATCH];
  int64_t position[BATCH];
};

// Running softmax of LANES queries (online softmax: Milakov & Gimelshein, arXiv 1805.02867).
class Tile {
 public:
  Tile(int64_t width, int64_t value_width)
      : width_(width), value_width_(value_width),
        memory_((2 * width + value_width + BATCH) * LANES + width + value_width +
                64 / sizeof(float)) {
    auto base = reinterpret_cast<uintptr_t>(memory_.data());
    query_ = memory_.data() + ((64 - base % 64) % 64) / sizeof(float);
    weighted_ = query_ + width * LANES;
    weighted_keys_ = weighted_ + value_width * LANES;
    logits_ = weighted_keys_ + width * LANES;
    single_ = logits_ + BATCH * LANES;
  }

  bool with_keys = false;  // sum up the keys, too, weighted like the values

  // The queries of a tile; one alone (decoding) is kept as a row, too.
  void load(const float* rows, int64_t stride, int n, float scale) {
    load_queries(rows, stride, n, width_, scale, query_);
    alone_ = n == 1;
    for (int64_t d = 0; alone_ && d < width_; ++d) single_[d] = rows[d] * scale;
  }

  Batch batch;
  Lanes peak, mass;

  void clear() {
    peak = all(NONE);
    mass = Lanes{};
    std::memset(weighted_, 0, (value_width_ + width_) * LANES * sizeof(float));
    batch.n = 0;
    batch.whole = true;
  }

  // Merges an earlier softmax (peak, mass, weighted values) into some lanes. `tilted`: its logits
  // are those of `mean`, and change with a query by their gradient, the mean key.
  void merge(uint32_t lanes, const float* part, const float* tilted = nullptr, float scale = 0) {
    const Ints chosen = lanes_of(part[1] > 0 ? lanes : 0);
    Lanes height = all(part[0]);
    if (tilted && part[1] > 0) {
      const float* keys = part + 2 + value_width_;
      float own = 0;
      Lanes others = {};
      for (int64_t d = 0; d < width_; ++d) {
        own += tilted[d] * keys[d];
        others += at(query_ + d * LANES) * keys[d];
      }
      height += (others - scale * own) / part[1];
    }
    const Lanes top = chosen ? larger(peak, height) : peak;
    const Lanes base = top == NONE ? Lanes{} : top;
    const Lanes mine = exp_of(peak - base);
    const Lanes theirs = chosen ? exp_of(height - base) : Lanes{};
    peak = top;
    mass = mass * mine + theirs * part[1];
    for (int64_t d = 0; d < value_width_; ++d)
      at(weighted_ + d * LANES) = at(weighted_ + d * LANES) * mine + theirs * part[2 + d];
  }

  void part_of(int i, float* part) const {
    part[0] = peak[i];
    part[1] = mass[i];
    for (int64_t d = 0; d < value_width_; ++d) part[2 + d] = weighted_[d * LANES + i];
    for (int64_t d = 0; with_keys && d < width_; ++d)
      part[2 + value_width_ + d] = weighted_keys_[d * LANES + i];
  }

  void output_of(int i, float* output) const {
    const float scale = mass[i] > 0 ? 1 / mass[i] : 0;
    for (int64_t d = 0; d < value_width_; ++d) output[d] = weighted_[d * LANES + i] * scale;
  }

  // Logits of the batch before they are masked; `finish` takes them in.
  float* logits(double softcap) {
    for (; batch.n % WIDE; ++batch.n) {  // fill up with keys that no lane sees
      const int last = batch.n - 1;
      batch.key[batch.n] = batch.key[last];
      batch.value[batch.n] = batch.value[last];
      batch.added[batch.n] = NONE;
      batch.lanes[batch.n] = 0;
      batch.position[batch.n] = batch.position[last];
      batch.whole = false;
    }
    for (int j = 0; alone_ && j < batch.n; ++j) {
      at(logits_ + j * LANES) = Lanes{};
      logits_[j * LANES] = dot_product(single_, batch.key[j], width_);
    }
    for (int j = 0; !alone_ && j < batch.n; j += WIDE)
      dot_products(query_, batch.key + j, width_, logits_ + j * LANES);
    if (softcap > 0) {
      const float cap = static_cast<float>(softcap);
      for (int i = 0; i < batch.n * LANES; ++i) logits_[i] = cap * std::tanh(logits_[i] / cap);
    }
    return logits_;
  }

  void finish() {
    const int n = batch.n;
    Lanes top = peak;
    for (int j = 0; j < n; ++j) top = larger(top, at(logits_ + j * LANES));
    const Lanes base = top == NONE ? Lanes{} : top;
    const Lanes kept = exp_of(peak - base);
    Lanes sum = mass * kept;
    for (int j = 0; j < n; ++j) {
      const Lanes weight = exp_of(at(logits_ + j * LANES) - base);
      sum += weight;
      at(logits_ + j * LANES) = weight;
    }
    peak = top;
    mass = sum;
    if (alone_)
      weigh_alone(kept[0]);
    else
      weigh(kept, batch.value, value_width_, weighted_);
    if (with_keys) weigh(kept, batch.key, width_, weighted_keys_);
    batch.n = 0;
    batch.whole = true;
  }

 private:
  // Adds the batch's values (or keys) to the sums of the lanes.
  void weigh(const Lanes& kept, const float* const* values, int64_t width, float* weighted) {
    const int n = batch.n;
    int64_t d = 0;
    for (; d + WIDE <= width; d += WIDE) {
      Lanes sums[WIDE];
#pragma GCC unroll 16
      for (int i = 0; i < WIDE; ++i) sums[i] = at(weighted + (d + i) * LANES) * kept;
      for (int j = 0; j < n; ++j) {
        const Lanes weight = at(logits_ + j * LANES);
        const float* value = values[j] + d;
#pragma GCC unroll 16
        for (int i = 0; i < WIDE; ++i) sums[i] += weight * value[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < WIDE; ++i) at(weighted + (d + i) * LANES) = sums[i];
    }
    for (; d < width; ++d) {
      Lanes sums = at(weighted + d * LANES) * kept;
      for (int j = 0; j < n; ++j) sums += at(logits_ + j * LANES) * values[j][d];
      at(weighted + d * LANES) = sums;
    }
  }

  // The same for one query: lanes along the features of the values.
  void weigh_alone(float kept) {
    float* row = single_ + width_;
    std::fill(row, row + value_width_, 0.0f);
    for (int j = 0; j < batch.n; ++j) {
      const float weight = logits_[j * LANES];
      const float* value = batch.value[j];
      for (int64_t d = 0; d < value_width_; ++d) row[d] += weight * value[d];
    }
    for (int64_t d = 0; d < value_width_; ++d)
      weighted_[d * LANES] = weighted_[d * LANES] * kept + row[d];
  }

  int64_t width_, value_width_;
  bool alone_ = false;
  std::vector<float> memory_;
  float *query_, *weighted_, *weighted_keys_, *logits_;
  float* single_;  // a query and a sum of values
};

// Which rows of blocks the lanes of a tile belong to, and the bitmaps of those.
struct RowsOfBlocks {
  int n = 0;
  const uint64_t* bits[LANES];
  uint32_t lanes[LANES];

  // Queries [first, first + count) as lanes, blocks of `side` queries.
  RowsOfBlocks(const uint64_t* bitmap, int64_t words, int64_t side, int64_t first, int count) {
    for (int i = 0; i < count; ++i) {
      const uint64_t* own = bitmap + (first + i) / side * words;
      if (n == 0 || bits[n - 1] != own) {
        bits[n] = own;
        lanes[n++] = 0;
      }
      lanes[n - 1] |= 1u << i;
    }
  }

  // Calls visit(col, lanes) for every bit set in some row.
  template <typename Visit>
  void each(int64_t words, Visit visit) const {
    for (int64_t w = 0; w < words; ++w) {
      uint64_t any = 0, every = ~uint64_t{0};
      for (int r = 0; r < n; ++r) {
        any |= bits[r][w];
        every &= bits[r][w];
      }
      for (; any; any &= any - 1) {
        const int bit = __builtin_ctzll(any);
        uint32_t chosen = 0;
        if (every >> bit & 1)
          chosen = EVERY_LANE;
        else
          for (int r = 0; r < n; ++r)
            if (bits[r][w] >> bit & 1) chosen |= lanes[r];
        visit(w * 64 + bit, chosen);
      }
    }
  }
};

// Takes the batch in: adds biases, hides what is hidden.
void take(const Call& call, Tile& tile, const Bias& bias, int64_t b, int64_t h, int64_t first,
          int count, bool intervals) {
  Batch& batch = tile.batch;
  if (batch.n == 0) return;
  float* logits = tile.logits(call.softcap);
  if (bias.data)
    for (int j = 0; j < batch.n; ++j)
      for (int i = 0; i < count; ++i)
        logits[j * LANES + i] += bias_at(bias, b, h, first + i, batch.position[j]);
  if (!intervals)
    for (int j = 0; j < batch.n; ++j) at(logits + j * LANES) += batch.added[j];
  if (!batch.whole) {
    Ints start = all_ints(0), stop = all_ints(std::numeric_limits<int32_t>::max());
    if (intervals)
      for (int i = 0; i < count; ++i) {
        start[i] = static_cast<int32_t>(call.start[b * call.interval_batch + first + i]);
        stop[i] = static_cast<int32_t>(call.stop[b * call.interval_batch + first + i]);
      }
    for (int j = 0; j < batch.n; ++j) {
      const Ints key = all_ints(static_cast<int32_t>(batch.position[j]));
      const Ints seen = lanes_of(batch.lanes[j]) & (key >= start) & (key < stop);
      at(logits + j * LANES) = seen ? at(logits + j * LANES) : all(NONE);
    }
  }
  tile.finish();
}

// Every real key of the opened blocks.
void add_exact(const Call& call, const Level& level, Tile& tile, int64_t b, int64_t h,
               int64_t first, int count) {
  const int64_t kv = h / (call.heads / call.kv_heads);
  int64_t latest_start = 0, earliest_stop = call.keys;
  for (int i = 0; i < count; ++i) {
    const int64_t at_row = b * call.interval_batch + first + i;
    latest_start = std::max(latest_start, call.start[at_row]);
    earliest_stop = std::min(earliest_stop, call.stop[at_row]);
  }
  const RowsOfBlocks rows(level.open + (b * call.heads + h) * level.rows * level.words,
                          level.words, level.side, first, count);
  const int64_t* real = call.real_before ? call.real_before + b * call.real_batch : nullptr;
  Batch& batch = tile.batch;
  rows.each(level.words, [&](int64_t col, uint32_t lanes) {
    const int64_t low = col * level.key_side, high = std::min(low + level.key_side, call.keys);
    const bool whole = lanes == EVERY_LANE && low >= latest_start && high <= earliest_stop;
    for (int64_t j = low; j < high; ++j) {
      if (real && real[j + 1] == real[j]) continue;
      batch.key[batch.n] = row_of(call.key, b, kv, j);
      batch.value[batch.n] = row_of(call.value, b, kv, j);
      batch.lanes[batch.n] = lanes;
      batch.position[batch.n] = j;
      batch.whole &= whole;
      if (++batch.n == BATCH) take(call, tile, call.bias, b, h, first, count, true);
    }
  });
  take(call, tile, call.bias, b, h, first, count, true);
}

// One logit for each block left behind, which stands for as many keys as are real in it.
void add_coarse(const Call& call, const Level& level, const Bias& bias, int64_t side, Tile& tile,
                int64_t b, int64_t h, int64_t first, int count) {
  const int64_t kv = h / (call.heads / call.kv_heads);
  const RowsOfBlocks rows(level.left + (b * call.heads + h) * level.rows * level.words,
                          level.words, side, first, count);
  Batch& batch = tile.batch;
  rows.each(level.words, [&](int64_t col, uint32_t lanes) {
    batch.key[batch.n] = row_of(level.key, b, kv, col);
    batch.value[batch.n] = row_of(level.value, b, kv, col);
    batch.added[batch.n] = level.log_keys ? level.log_keys[b * level.cols + col] : 0;
    batch.lanes[batch.n] = lanes;
    batch.position[batch.n] = col;
    batch.whole &= lanes == EVERY_LANE;
    if (++batch.n == BATCH) take(call, tile, bias, b, h, first, count, false);
  });
  take(call, tile, bias, b, h, first, count, false);
}

}  // namespace

// Coarse: 0 none, 1 one score per block pair, 2 one per query and key block, 3 like 1 but tilted.
extern "C" void mra_attend(const Call* call_, const Level* levels, int64_t n_levels,
                              int64_t coarse) {
  const Call& call = *call_;
  const int64_t n_heads = call.batch * call.heads;
  const float scale = static_cast<float>(call.scaling);
  const bool tilted = coarse == 3, pooled = coarse == 1 || tilted;
  const int64_t size = call.value_width + 2 + tilted * call.width;
#pragma omp parallel num_threads(call.threads)
  {
    Tile tile(call.width, call.value_width);
    std::vector<float> sink(size, 0.0f);  // a softmax of mass 1 without a value
    sink[1] = 1;
    tile.with_keys = tilted;
    for (int64_t l = 0; pooled && l < n_levels; ++l) {
      const Level& level = levels[l];
      const int64_t groups = (level.rows + LANES - 1) / LANES;
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < n_heads * groups; ++t) {
        const int64_t b = t / groups / call.heads, h = t / groups % call.heads;
        const int64_t first = t % groups * LANES;
        const int count = static_cast<int>(std::min<int64_t>(LANES, level.rows - first));
        tile.clear();
        tile.load(row_of(level.query, b, h, first), level.query.row, count, scale);
        add_coarse(call, level, level.pair_bias, 1, tile, b, h, first, count);
        for (int i = 0; i < count; ++i)
          tile.part_of(i, level.parts + ((b * call.heads + h) * level.rows + first + i) * size);
      }
    }
    tile.with_keys = false;
    const int64_t tiles = (call.queries + LANES - 1) / LANES;
    // Tiles of one row of blocks want the same keys: one thread, so that it has them at hand.
    const int64_t together = std::max<int64_t>(1, levels[n_levels - 1].side / LANES);
#pragma omp for schedule(dynamic, together)
    for (int64_t t = 0; t < n_heads * tiles; ++t) {
      const int64_t bh = t / tiles, b = bh / call.heads, h = bh % call.heads;
      const int64_t first = t % tiles * LANES;
      const int count = static_cast<int>(std::min<int64_t>(LANES, call.queries - first));
      tile.clear();
      tile.load(row_of(call.query, b, h, first), call.query.row, count, scale);
      add_exact(call, levels[n_levels - 1], tile, b, h, first, count);
      for (int i = 0; i < count; ++i)
        call.lse[bh * call.queries + first + i] =
            tile.mass[i] > 0 ? tile.peak[i] + std::log(tile.mass[i]) : NONE;
      for (int64_t l = 0; l < n_levels; ++l) {
        const Level& level = levels[l];
        if (coarse == 2) add_coarse(call, level, level.query_bias, level.side, tile, b, h, first, count);
        if (!pooled) continue;
        for (int i = 0, next; i < count; i = next) {  // lanes of one row of blocks
          const int64_t row = (first + i) / level.side;
          next = static_cast<int>(std::min<int64_t>((row + 1) * level.side - first, LANES));
          tile.merge((1u << next) - (1u << i), level.parts + (bh * level.rows + row) * size,
                     tilted ? row_of(level.query, b, h, row) : nullptr, scale);
        }
      }
      if (call.sinks) {
        sink[0] = call.sinks[h];
        tile.merge(EVERY_LANE, sink.data());
      }
      for (int i = 0; i < count; ++i)
        tile.output_of(i, call.output + (bh * call.queries + first + i) * call.value_width);
    }
  }
}
