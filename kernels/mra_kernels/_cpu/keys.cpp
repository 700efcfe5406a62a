// Which keys each block of queries opens: the rules of keys.py, one head at a time.
#include "estimate.h"

namespace {

// One bit for each of 64 bytes (all below 128): those below `limit`.
inline uint64_t below(const uint8_t* bytes, int limit) {
#if defined(__AVX512BW__)
  const __m512i all_bytes = _mm512_loadu_si512(bytes);
  return _mm512_cmplt_epu8_mask(all_bytes, _mm512_set1_epi8(static_cast<char>(limit)));
#else
  uint64_t bits = 0;
  for (int byte = 0; byte < 8; ++byte) {
    uint64_t eight;
    std::memcpy(&eight, bytes + byte * 8, 8);
    const uint64_t over = eight + static_cast<uint64_t>(128 - limit) * 0x0101010101010101u;
    bits |= ((~over & 0x8080808080808080u) / 128 * 0x0102040810204080u >> 56) << byte * 8;
  }
  return bits;
#endif
}

struct Chooser {
  const Call& call;
  const Level& level;
  const Estimate& estimate;
  Estimator& estimator;

  uint64_t* open(int64_t head, int64_t row) const {
    return level.open + (head * level.rows + row) * level.words;
  }
  uint64_t* left(int64_t head, int64_t row) const {
    return level.left + (head * level.rows + row) * level.words;
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
    int32_t apart[4][FARTHEST + 1] = {};  // neighbours are often equally far
    put_all(rest, reach.all_low, reach.all_high);
    int64_t next = reach.all_low;
    for (; next + 8 <= reach.all_high; next += 8) {
      uint64_t eight;
      std::memcpy(&eight, distances + next, 8);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) ++apart[i % 4][eight >> i * 8 & 255];
    }
    for (; next < reach.all_high; ++next) ++apart[next % 4][distances[next]];
    tally.left += reach.all_high - reach.all_low;
    for (int64_t j = reach.all_low; estimate.hidden && j < reach.all_high; ++j) {
      if (!estimator.hidden(b, j)) continue;
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
        const uint64_t near = below(own + w * 64, edge);
        const uint64_t nearer = ties ? below(own + w * 64, edge + 1) : near;
        uint64_t chosen = near & rest[w];
        for (uint64_t at_edge = nearer & ~near & rest[w]; at_edge && ties;
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
      Speakers speakers;
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < n_heads; ++t)
        estimator.of_keys[t] = estimator.bytes_of_keys(first_head + t);
#pragma omp for schedule(dynamic, 4)
      for (int64_t t = 0; t < n_heads * level.rows; ++t) {
        const int64_t head = first_head + t / level.rows, b = head / call.heads;
        const int64_t row = t % level.rows, first = row * level.side;
        const int64_t end = std::min(first + level.side, call.queries);
        const Reach reach(call, b, first, end);
        if (!reach.live) continue;
        uint8_t* distances = estimate.distances + t * estimate.padded;
        estimator.normalise(head, row, reach, speakers);
        if (call.bias.data)
          estimator.measure<true>(head, reach, speakers, distances);
        else
          estimator.measure<false>(head, reach, speakers, distances);
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
  const int64_t heads = call->batch * call->heads;
  for (int64_t first = 0; first < heads; first += estimate->heads_at_once) {
    const int64_t n_heads = std::min(estimate->heads_at_once, heads - first);
    Estimator estimator = {*call, *level, *estimate, first, std::vector<KeyBytes>(n_heads)};
    Chooser{*call, *level, *estimate, estimator}.run(first, n_heads, padding, tallies);
  }
}
