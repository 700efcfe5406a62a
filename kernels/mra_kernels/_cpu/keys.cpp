// Which keys each block of queries opens: the rules of keys.py, one head at a time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "call.h"
#include "lanes.h"

namespace {

constexpr int FARTHEST = 127, ROWS = 4, GROUP = 4;  // queries, and registers of keys, at a time
constexpr int64_t KEYS = GROUP * LANES;
constexpr float STEPS_PER_NAT = 8;

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

// One bit for each of 8 bytes (all below 128): those below `limit`.
inline uint64_t below(const uint8_t* bytes, int limit) {
  uint64_t eight;
  std::memcpy(&eight, bytes, 8);
  const uint64_t over = eight + static_cast<uint64_t>(128 - limit) * 0x0101010101010101u;
  return (~over & 0x8080808080808080u) / 128 * 0x0102040810204080u >> 56;
}

struct Chooser {
  const Call& call;
  const Level& level;
  const Estimate& estimate;

  uint64_t* open(int64_t head, int64_t row) const {
    return level.open + (head * level.rows + row) * level.words;
  }
  uint64_t* left(int64_t head, int64_t row) const {
    return level.left + (head * level.rows + row) * level.words;
  }
  bool hidden(int64_t b, int64_t key) const {
    return estimate.hidden && estimate.hidden[b * estimate.padded + key] != 0;
  }

  // Estimated logits of rows [first, end) -> scores [rows][padded], and what to take off each.
  void score(int64_t head, int64_t first, int64_t end, const Reach& reach, float* scores,
             float* normaliser) const {
    const int64_t b = head / call.heads, h = head % call.heads;
    const int64_t padded = estimate.padded, rank = estimate.rank;
    const float* keys = estimate.key + head * rank * padded;
    const float* queries = estimate.query + head * call.queries * rank;
    const int64_t begin = reach.any_low / KEYS * KEYS;
    for (int64_t i = first; i < end; i += ROWS) {
      const int64_t n = std::min<int64_t>(ROWS, end - i);
      int64_t start[ROWS], stop[ROWS];
      const float* query[ROWS];
      Lanes peak[ROWS];
      for (int r = 0; r < ROWS; ++r) {
        const int64_t row = i + std::min<int64_t>(r, n - 1);  // the last once more
        start[r] = call.start[b * call.interval_batch + row];
        stop[r] = call.stop[b * call.interval_batch + row];
        query[r] = queries + row * rank;
        peak[r] = all(NONE);
      }
      for (int64_t j = begin; j < reach.any_high; j += KEYS) {
        Lanes sums[ROWS][GROUP];
        for (int g = 0; g < GROUP; ++g) {
          const Lanes zero =
              estimate.hidden ? at(estimate.hidden + b * padded + j + g * LANES) : Lanes{};
          for (int r = 0; r < ROWS; ++r) sums[r][g] = zero;
        }
        for (int64_t d = 0; d < rank; ++d) {
          const float* some = keys + d * padded + j;
#pragma GCC unroll 4
          for (int g = 0; g < GROUP; ++g) {
            const Lanes lanes = at(some + g * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) sums[r][g] += lanes * query[r][d];
          }
        }
        for (int r = 0; r < n; ++r) {
          float* out = scores + (i - first + r) * padded + j;
          for (int g = 0; g < GROUP; ++g) at(out + g * LANES) = sums[r][g];
          const int64_t high = std::min(j + KEYS, call.keys);
          for (int64_t key = j; call.bias.data && key < high; ++key)
            out[key - j] += bias_at(call.bias, b, h, i + r, key);
          if (j < start[r]) std::fill(out, out + std::min(start[r] - j, KEYS), NONE);
          if (j + KEYS > stop[r]) std::fill(out + std::max<int64_t>(stop[r] - j, 0), out + KEYS, NONE);
          for (int g = 0; g < GROUP; ++g) peak[r] = larger(peak[r], at(out + g * LANES));
        }
      }
      for (int r = 0; r < n; ++r)
        normaliser[i - first + r] =
            log_sum(scores + (i - first + r) * padded, begin, reach.any_high, peak[r]);
    }
  }

  static float log_sum(const float* scores, int64_t begin, int64_t end, const Lanes& peaks) {
    float peak = NONE, total = 0;
    for (int i = 0; i < LANES; ++i) peak = std::max(peak, peaks[i]);
    if (peak == NONE) return 0;
    Lanes sums[GROUP] = {};
    for (int64_t j = begin; j < end; j += KEYS)
      for (int g = 0; g < GROUP; ++g) sums[g] += roughly_exp(at(scores + j + g * LANES) - peak);
    for (int g = 0; g < GROUP; ++g)
      for (int i = 0; i < LANES; ++i) total += sums[g][i];
    return peak + std::log(total);
  }

  // Steps that each key is away from the nearest query that counts.
  void measure(int64_t b, int64_t first, int64_t end, const Reach& reach, const float* scores,
               const float* normaliser, uint8_t* distances) const {
    std::vector<int64_t> speak;
    for (int64_t i = first; i < end; ++i)
      if (estimate.counted[b * call.queries + i]) speak.push_back(i - first);
    for (int64_t j = reach.any_low / KEYS * KEYS; j < reach.any_high; j += KEYS) {
      Lanes nearest[GROUP];
      for (int g = 0; g < GROUP; ++g) nearest[g] = all(-FARTHEST);
      for (int64_t row : speak)
        for (int g = 0; g < GROUP; ++g)
          nearest[g] = larger(nearest[g], at(scores + row * estimate.padded + j + g * LANES) -
                                              normaliser[row]);
      for (int g = 0; g < GROUP; ++g) {
        const Ints steps = __builtin_convertvector(nearest[g] * -STEPS_PER_NAT, Ints);
        const Ints most = all_ints(FARTHEST - 1), least = all_ints(0);
        Ints held = steps < most ? steps : most;
        held = (held > least ? held : least) + 1;
        typedef uint8_t Bytes __attribute__((vector_size(LANES)));
        const Bytes bytes = __builtin_convertvector(held, Bytes);
        std::memcpy(distances + j + g * LANES, &bytes, LANES);
      }
    }
  }

  // Opens what the mask cuts through; what is left is on offer, in `counts` by its distance.
  void offer(int64_t head, int64_t row, const Reach& reach, uint8_t* distances, int64_t* counts,
             Tally& tally) const {
    const int64_t b = head / call.heads;
    const int64_t first = row * level.side, end = std::min(first + level.side, call.queries);
    uint64_t *opened = open(head, row), *rest = left(head, row);
    const int64_t favoured = level.first_col[b] + estimate.first_keys;
    for (int64_t j = reach.any_low; j < std::min(favoured, reach.any_high); ++j) distances[j] = 0;
    for (int64_t j = reach.any_low; j < reach.any_high; ++j) {
      if (j == reach.all_low) {
        whole(b, reach, rest, distances, counts, tally);
        j = reach.all_high;
        if (j >= reach.any_high) break;
      }
      int64_t seen = 0;
      for (int64_t i = first; i < end; ++i) seen += visible(call, b, i, j, j + 1);
      if (seen) put(opened, j);
      tally.forced += seen;
    }
  }

  void whole(int64_t b, const Reach& reach, uint64_t* rest, const uint8_t* distances,
             int64_t* counts, Tally& tally) const {
    uint32_t apart[4][FARTHEST + 1] = {};  // neighbours are often equally far
    put_all(rest, reach.all_low, reach.all_high);
    for (int64_t j = reach.all_low; j < reach.all_high; ++j) ++apart[j % 4][distances[j]];
    tally.left += reach.all_high - reach.all_low;
    for (int64_t j = reach.all_low; estimate.hidden && j < reach.all_high; ++j) {
      if (!hidden(b, j)) continue;
      rest[j / 64] &= ~(uint64_t{1} << (j % 64));
      --apart[j % 4][distances[j]];
      --tally.left;
    }
    for (const auto& some : apart)
      for (int d = 0; d <= FARTHEST; ++d) counts[d] += some[d] * reach.live;
  }

  // Opens the nearest offers of some blocks, up to the budget; ties by place.
  void spend(int64_t head, const std::vector<int64_t>& rows, const uint8_t* distances,
             const int64_t* counts, int64_t budget, Tally& tally) const {
    const int64_t b = head / call.heads;
    int edge = 0;
    while (edge <= FARTHEST && counts[edge] <= budget) budget -= counts[edge++];
    bool ties = edge <= FARTHEST;
    for (int64_t row : rows) {
      const uint8_t* own = distances + row * estimate.padded;
      uint64_t *opened = open(head, row), *rest = left(head, row);
      const int64_t first = row * level.side, end = std::min(first + level.side, call.queries);
      const Reach reach(call, b, first, end);
      for (int64_t w = 0; w < level.words; ++w) {
        if (!rest[w]) continue;
        uint64_t near = 0, nearer = 0;
        for (int byte = 0; byte < 8; ++byte) {
          const uint8_t* some = own + w * 64 + byte * 8;
          near |= below(some, edge) << byte * 8;
          if (ties) nearer |= below(some, edge + 1) << byte * 8;
        }
        uint64_t chosen = near & rest[w];
        for (uint64_t at_edge = ties ? nearer & ~near & rest[w] : 0; at_edge && ties;
             at_edge &= at_edge - 1) {
          ties = reach.live <= budget;
          if (!ties) break;
          budget -= reach.live;
          chosen |= at_edge & -at_edge;
        }
        opened[w] |= chosen;
        rest[w] &= ~chosen;
        const int64_t n = __builtin_popcountll(chosen);
        tally.exact += n * reach.live;
        tally.left -= n;
      }
    }
  }

  void run(int64_t first_head, int64_t n_heads, const uint8_t* padding, Tally* tallies) const {
    // Per head: what is on offer of real blocks and of padding, and what the mask demanded of them.
    std::vector<int64_t> counts(n_heads * 2 * (FARTHEST + 1), 0);
    std::vector<Tally> apart(n_heads * 2, Tally{0, 0, 0, 0});
#pragma omp parallel num_threads(call.threads)
    {
      std::vector<float> scores(level.side * estimate.padded), normaliser(level.side);
#pragma omp for schedule(dynamic, 4)
      for (int64_t t = 0; t < n_heads * level.rows; ++t) {
        const int64_t head = first_head + t / level.rows, b = head / call.heads;
        const int64_t row = t % level.rows, first = row * level.side;
        const int64_t end = std::min(first + level.side, call.queries);
        const Reach reach(call, b, first, end);
        if (!reach.live) continue;
        uint8_t* distances = estimate.distances + t * estimate.padded;
        score(head, first, end, reach, scores.data(), normaliser.data());
        measure(b, first, end, reach, scores.data(), normaliser.data(), distances);
        int64_t own[FARTHEST + 1] = {};
        Tally tally = {0, 0, 0, 0};
        offer(head, row, reach, distances, own, tally);
        const int64_t segment = t / level.rows * 2 + padding[b * level.rows + row];
#pragma omp critical
        {
          for (int d = 0; d <= FARTHEST; ++d) counts[segment * (FARTHEST + 1) + d] += own[d];
          apart[segment].forced += tally.forced;
          apart[segment].left += tally.left;
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < n_heads; ++t) {
        const int64_t head = first_head + t, b = head / call.heads;
        std::vector<int64_t> rows[2];
        int64_t entries[2] = {0, 0};
        for (int64_t row = 0; row < level.rows; ++row) {
          const bool is_padding = padding[b * level.rows + row];
          rows[is_padding].push_back(row);
          entries[is_padding] += level.entries[b * level.rows + row];
        }
        for (int64_t s = 0; s < 2; ++s) {
          Tally& tally = apart[t * 2 + s];
          const double worth = estimate.budgets[head % call.heads] * static_cast<double>(entries[s]);
          const int64_t budget = static_cast<int64_t>(worth + 1e-6) - tally.forced;
          tally.exact = tally.forced;
          spend(head, rows[s], estimate.distances + t * level.rows * estimate.padded,
                &counts[(t * 2 + s) * (FARTHEST + 1)], budget, tally);
        }
        // Density is of real rows alone; `scored` holds the exact entries of all.
        tallies[head] = {apart[t * 2].exact, apart[t * 2].forced,
                         apart[t * 2].exact + apart[t * 2 + 1].exact,
                         apart[t * 2].left + apart[t * 2 + 1].left};
      }
    }
  }
};

}  // namespace

// Fills the level's bitmaps (zeroed by the caller) and a tally for each head.
// padding: blocks without a real query [batch][rows].
extern "C" void mra_select_keys(const Call* call, const Level* level, const Estimate* estimate,
                                const uint8_t* padding, Tally* tallies) {
  const Chooser chooser = {*call, *level, *estimate};
  const int64_t heads = call->batch * call->heads;
  for (int64_t first = 0; first < heads; first += estimate->heads_at_once)
    chooser.run(first, std::min(estimate->heads_at_once, heads - first), padding, tallies);
}
