// Which block pairs are opened: the greedy refinement of selection.py, one head at a time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "call.h"
#include "lanes.h"

namespace {

constexpr uint32_t FAVOURED = uint32_t{1} << 31;

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
inline float largest(const float* values, int64_t n) {
  Lanes best = all(NONE);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) best = larger(best, at(values + i));
  float result = NONE;
  for (int lane = 0; lane < LANES; ++lane) result = std::max(result, best[lane]);
  for (; i < n; ++i) result = std::max(result, values[i]);
  return result;
}

// A block pair that may be opened; its rank orders like its score, favoured ones first.
struct Offer {
  uint32_t rank, cost;

  Offer() = default;
  Offer(float score, bool favoured, int64_t price) : cost(static_cast<uint32_t>(price)) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    bits ^= static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | uint32_t{1} << 31;
    rank = bits >> 1 | (favoured ? FAVOURED : 0);
  }
};

// Columns of key blocks that the rows of a query block reach, and those all of them see whole.
struct Reach {
  int64_t any_low, any_high, all_low, all_high;

  Reach(const Call& call, const Level& level, int64_t b, int64_t row) {
    const int64_t side = level.key_side, end = std::min((row + 1) * level.side, call.queries);
    const int64_t* start = call.start + b * call.interval_batch;
    const int64_t* stop = call.stop + b * call.interval_batch;
    int64_t first = call.keys, last = 0, latest = 0, earliest = call.keys;
    for (int64_t i = row * level.side; i < end; ++i) {
      latest = std::max(latest, start[i]);
      earliest = std::min(earliest, stop[i]);
      if (stop[i] <= start[i]) continue;
      first = std::min(first, start[i]);
      last = std::max(last, stop[i]);
    }
    any_low = first / side;
    any_high = std::max(any_low, (last + side - 1) / side);
    all_low = (latest + side - 1) / side;
    all_high = earliest == call.keys ? (call.keys + side - 1) / side : earliest / side;
  }
};

// Key blocks that the configured priors put first in one row of blocks.
struct Favoured {
  int64_t columns, band_low, band_high;  // the first ones, and a band

  Favoured(const Level& level, const Choice& choice, int64_t b, int64_t row)
      : columns(0), band_low(0), band_high(-1) {
    const int64_t first_position = row * level.side + choice.offset;
    const int64_t place = floor_div(first_position, level.key_side);
    if (choice.first_blocks) {
      const int64_t earlier = floor_div(choice.offset, level.side);
      const bool whole_row = row + earlier < level.first_row[b] + choice.first_blocks;
      columns = whole_row ? level.cols : level.first_col[b] + choice.first_blocks;
    }
    if (choice.diagonal_blocks) {
      band_low = place - choice.diagonal_blocks / 2;
      band_high = place + level.side / level.key_side - 1 + choice.diagonal_blocks / 2;
    }
  }

  bool operator()(int64_t col) const {
    return col < columns || (col >= band_low && col <= band_high);
  }
};

// Everything about one step of the refinement.
struct Step {
  const Call& call;
  const Choice& choice;
  const Level& level;
  const Level* above;  // null at the coarsest side
  const Level& top;
  bool last;

  // Floats from one row of scores to the next: no power of two, so that all rows fit a cache.
  int64_t stride() const { return level.cols + LANES; }
  int64_t batch_of(int64_t head) const { return head / call.heads; }
  uint64_t* open(int64_t head, int64_t row) const {
    return level.open + (head * level.rows + row) * level.words;
  }
  uint64_t* left(int64_t head, int64_t row) const {
    return level.left + (head * level.rows + row) * level.words;
  }
  bool padding(int64_t b, int64_t row) const {
    return choice.padding[b * top.rows + row * level.side / top.side];
  }

  // Entries of a block pair that the mask does not cut.
  int64_t entries(int64_t b, int64_t row, int64_t col) const {
    return level.n_queries[b * level.rows + row] * level.n_keys[b * level.cols + col];
  }

  // Visible entries of a block pair; `cut`: the mask hides some of them.
  int64_t legal(int64_t b, int64_t row, int64_t col, const Reach& reach, bool* cut) const {
    const int64_t full = entries(b, row, col);
    *cut = false;
    if (col >= reach.all_low && col < reach.all_high) return full;
    const int64_t low = col * level.key_side, high = std::min(low + level.key_side, call.keys);
    int64_t count = 0;
    for (int64_t i = row * level.side; i < std::min((row + 1) * level.side, call.queries); ++i)
      count += visible(call, b, i, low, high);
    *cut = count > 0 && count < full;
    return count;
  }

  const uint64_t* parents(int64_t head, int64_t row) const {
    const int64_t ratio = above->side / level.side;
    return above->open + (head * above->rows + row / ratio) * above->words;
  }

  // Calls visit(first, end) for runs of candidates [first, end) of some rows, from left to right.
  template <typename Visit>
  void candidates(int64_t head, int64_t row, int64_t end_row, int64_t low, int64_t high,
                  Visit visit) const {
    if (!above) {
      if (low < high) visit(low, high);
      return;
    }
    const int64_t ratio = above->side / level.side;
    for (int64_t w = 0; w < above->words; ++w) {
      uint64_t bits = 0;
      for (int64_t r = row; r < end_row; r = (r / ratio + 1) * ratio) bits |= parents(head, r)[w];
      for (; bits; bits &= bits - 1) {
        const int64_t col = (w * 64 + __builtin_ctzll(bits)) * ratio;
        const int64_t first = std::max(col, low), end = std::min(col + ratio, high);
        if (first < end) visit(first, end);
      }
    }
  }

  // Pooled logits of up to LANES rows and all their candidates -> scores [LANES][stride()].
  void score(int64_t head, int64_t first, int count, const std::vector<Reach>& reach,
             std::vector<float>& query, float* scores) const {
    const int64_t b = batch_of(head), h = head % call.heads;
    const int64_t kv = h / (call.heads / call.kv_heads);
    load_queries(row_of(level.query, b, h, first), level.query.row, count, call.width,
                 static_cast<float>(call.scaling), query.data());
    const float* keys[WIDE];
    int64_t cols[WIDE];
    int n = 0;
    alignas(64) float dots[WIDE * LANES];
    const auto finish = [&] {
      for (int j = n; j < WIDE; ++j) keys[j] = keys[0];
      dot_products(query.data(), keys, call.width, dots);
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < count; ++i)
          scores[i * stride() + cols[j]] =
              logit(dots[j * LANES + i], b, h, first + i, cols[j]);
      n = 0;
    };
    int64_t low = level.cols, high = 0;
    for (const Reach& each : reach) {
      low = std::min(low, each.any_low);
      high = std::max(high, each.any_high);
    }
    candidates(head, first, first + count, low, high, [&](int64_t begin, int64_t end) {
      for (int64_t col = begin; col < end; ++col) {
        keys[n] = row_of(level.key, b, kv, col);
        cols[n++] = col;
        if (n == WIDE) finish();
      }
    });
    if (n) finish();
  }

  // Opens what the mask cuts through; the rest of the row is left, and on offer in that order.
  // Returns how many.
  int64_t offer(int64_t head, int64_t row, const Reach& reach, const float* scores, Offer* offers,
                Tally& tally, int64_t& spent) const {
    const int64_t b = batch_of(head);
    const bool padded = padding(b, row);
    uint64_t *opened = open(head, row), *rest = left(head, row);
    float best = NONE;
    const auto look = [&](int64_t begin, int64_t end) {
      for (int64_t col = begin; col < end; ++col) {
        bool cut;
        const int64_t seen = legal(b, row, col, reach, &cut);
        if (!seen) continue;
        ++tally.scored;
        best = std::max(best, scores[col]);
        if (!cut) {
          put(rest, col);
          continue;
        }
        put(opened, col);
        spent += choice.blocks_per_row ? 1 : seen;
        if (padded || !last) continue;
        tally.exact += seen;
        tally.forced += seen;
      }
    };
    const auto take = [&](int64_t begin, int64_t end) {
      const int64_t low = std::max(begin, reach.all_low), high = std::min(end, reach.all_high);
      if (call.real_before || low >= high) return look(begin, end);
      look(begin, low);
      put_all(rest, low, high);  // whole, by the mask's edges alone
      best = std::max(best, largest(scores + low, high - low));
      tally.scored += high - low;
      look(high, end);
    };
    candidates(head, row, row + 1, reach.any_low, reach.any_high, take);
    const float base = choice.by_row_best ? best : 0;
    const Favoured favoured(level, choice, b, row);
    const Offer* begin = offers;
    const auto made = [&](int64_t col) {
      const int64_t price = choice.blocks_per_row ? 1 : entries(b, row, col);
      return Offer(scores[col] - base, favoured(col), price);
    };
    for (int64_t w = 0; w < level.words; ++w) {
      if (!~rest[w]) {  // so many at once that a plain loop pays
        for (int64_t i = 0; i < 64; ++i) offers[i] = made(w * 64 + i);
        offers += 64;
        continue;
      }
      for (uint64_t bits = rest[w]; bits; bits &= bits - 1)
        *offers++ = made(w * 64 + __builtin_ctzll(bits));
    }
    return offers - begin;
  }

  // The best offers whose costs add up to at most `budget` (ties: from the left) are opened.
  void spend(int64_t head, const std::vector<int64_t>& rows, const Offer* offers,
             const int64_t* counts, int64_t budget, Tally& tally) const {
    const int64_t b = batch_of(head);
    uint32_t prefix = 0, decided = 0;  // the best rank that is not paid for, from its top bits
    for (const int shift : {21, 10, 0}) {
      const uint32_t digit = shift ? 2047 : 1023;
      std::vector<int64_t> costs(2048, 0);
      for (int64_t row : rows) {
        const Offer* own = offers + row * level.cols;
        for (int64_t i = 0; i < counts[row]; ++i)
          if ((own[i].rank & decided) == prefix) costs[own[i].rank >> shift & digit] += own[i].cost;
      }
      int64_t bin = digit;
      while (bin >= 0 && costs[bin] <= budget) budget -= costs[bin--];
      if (bin < 0) break;  // only at the first digit: everything is paid for
      prefix |= static_cast<uint32_t>(bin) << shift;
      decided |= digit << shift;
    }
    bool ties = true;
    for (int64_t row : rows) {
      const Offer* own = offers + row * level.cols;
      const bool counted = last && !padding(b, row);
      uint64_t *opened = open(head, row), *rest = left(head, row);
      for (int64_t w = 0; w < level.words; ++w) {
        uint64_t chosen = 0;
        for (uint64_t bits = rest[w]; bits; bits &= bits - 1, ++own) {
          if (own->rank < prefix) continue;
          if (decided && own->rank == prefix) {
            ties = ties && own->cost <= budget;
            if (!ties) continue;
            budget -= own->cost;
          }
          chosen |= bits & -bits;
          if (counted) tally.exact += entries(b, row, w * 64 + __builtin_ctzll(bits));
        }
        opened[w] |= chosen;
        rest[w] &= ~chosen;
      }
    }
  }

  // Whether query i sees a key of the opened blocks of its row, or has none to see.
  bool served(int64_t b, int64_t i, const uint64_t* opened) const {
    if (visible(call, b, i, 0, call.keys) == 0) return true;
    for (int64_t w = 0; w < level.words; ++w)
      for (uint64_t bits = opened[w]; bits; bits &= bits - 1) {
        const int64_t low = (w * 64 + __builtin_ctzll(bits)) * level.key_side;
        if (visible(call, b, i, low, std::min(low + level.key_side, call.keys)) > 0) return true;
      }
    return false;
  }

  // Without a coarse term: opens the best pair left of a row in which some query sees no key.
  void rescue(int64_t head, int64_t row, Tally& tally) const {
    const int64_t b = batch_of(head), h = head % call.heads;
    uint64_t *opened = open(head, row), *rest = left(head, row);
    const int64_t end = std::min((row + 1) * level.side, call.queries);
    int64_t i = row * level.side;
    while (i < end && served(b, i, opened)) ++i;
    if (i == end) return;
    int64_t best = -1;
    float highest = NONE;
    const float* query = row_of(level.query, b, h, row);
    for (int64_t w = 0; w < level.words; ++w)
      for (uint64_t bits = rest[w]; bits; bits &= bits - 1) {
        const int64_t col = w * 64 + __builtin_ctzll(bits);
        const float* key = row_of(level.key, b, h / (call.heads / call.kv_heads), col);
        float dot = 0;
        for (int64_t d = 0; d < call.width; ++d) dot += query[d] * key[d];
        const float score = logit(dot * static_cast<float>(call.scaling), b, h, row, col);
        if (best >= 0 && score <= highest) continue;
        best = col;
        highest = score;
      }
    if (best < 0) return;
    put(opened, best);
    rest[best / 64] &= ~(uint64_t{1} << (best % 64));
    if (!last || padding(b, row)) return;
    tally.exact += entries(b, row, best);
    tally.forced += entries(b, row, best);
  }

  float logit(float dot, int64_t b, int64_t h, int64_t row, int64_t col) const {
    const float cap = static_cast<float>(call.softcap);
    if (cap > 0) dot = cap * std::tanh(dot / cap);
    return level.pair_bias.data ? dot + bias_at(level.pair_bias, b, h, row, col) : dot;
  }

  int64_t budget_of(int64_t b, const std::vector<int64_t>& rows) const {
    int64_t worth = 0;
    for (int64_t row : rows) {
      const int64_t entries = level.entries[b * level.rows + row];
      worth += choice.blocks_per_row ? choice.blocks_per_row * (entries > 0) : entries;
    }
    if (choice.blocks_per_row) return worth;
    return static_cast<int64_t>(level.area * static_cast<double>(worth) + 1e-6);
  }

  void run(int64_t first_head, int64_t n_heads, Offer* offers, Tally* tallies) const {
    const int64_t groups = (level.rows + LANES - 1) / LANES;
    std::vector<int64_t> spent(n_heads * level.rows, 0), counts(n_heads * level.rows, 0);
#pragma omp parallel num_threads(call.threads)
    {
      std::vector<float> query(call.width * LANES), scores(LANES * stride());
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < n_heads * groups; ++t) {
        const int64_t head = first_head + t / groups, first = t % groups * LANES;
        const int count = static_cast<int>(std::min<int64_t>(LANES, level.rows - first));
        std::vector<Reach> reach;
        for (int i = 0; i < count; ++i)
          reach.emplace_back(call, level, batch_of(head), first + i);
        score(head, first, count, reach, query, scores.data());
        Tally tally = {0, 0, 0, 0};
        for (int i = 0; i < count; ++i) {
          const int64_t place = t / groups * level.rows + first + i;
          counts[place] = offer(head, first + i, reach[i], scores.data() + i * stride(),
                                offers + place * level.cols, tally, spent[place]);
        }
#pragma omp critical
        {
          tallies[head].exact += tally.exact;
          tallies[head].forced += tally.forced;
          tallies[head].scored += tally.scored;
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < n_heads; ++t) {
        const int64_t head = first_head + t, b = batch_of(head);
        const auto buy = [&](const std::vector<int64_t>& rows) {
          int64_t budget = budget_of(b, rows);
          for (int64_t row : rows) budget -= spent[t * level.rows + row];
          spend(head, rows, offers + t * level.rows * level.cols, &counts[t * level.rows], budget,
                tallies[head]);
        };
        std::vector<int64_t> real, padded;
        for (int64_t row = 0; row < level.rows; ++row) {
          if (choice.per_row)
            buy({row});
          else
            (padding(b, row) ? padded : real).push_back(row);
        }
        buy(real);
        buy(padded);
        for (int64_t row = 0; row < level.rows; ++row) {
          if (choice.leave_none) rescue(head, row, tallies[head]);
          for (int64_t w = 0; w < level.words; ++w)
            tallies[head].left += __builtin_popcountll(left(head, row)[w]) * level.side;
        }
      }
    }
  }
};

}  // namespace

// Fills the bitmaps of all levels (zeroed by the caller) and a tally for each head.
extern "C" void mra_select(const Call* call, const Level* levels, int64_t n_levels,
                           const Choice* choice, const Scratch* scratch, Tally* tallies) {
  const int64_t heads = call->batch * call->heads;
  for (int64_t l = 0; l < n_levels; ++l) {
    const Step step = {*call, *choice, levels[l], l ? &levels[l - 1] : nullptr, levels[0],
                       l == n_levels - 1};
    for (int64_t first = 0; first < heads; first += scratch->heads)
      step.run(first, std::min(scratch->heads, heads - first),
               static_cast<Offer*>(scratch->offers), tallies);
  }
}
