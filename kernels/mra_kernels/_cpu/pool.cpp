// Block means of tokens at every side, from fine to coarse.
#include <algorithm>
#include <vector>

#include "call.h"

constexpr int64_t SMALL = 1 << 16;  // numbers that are not worth waking threads for

// Means over the real tokens of each block; 0 for blocks without one.
//
// sides: from coarse to fine, each dividing the one before; means: one per side; valid: null if all
// are real.
extern "C" void mra_pool(const Rows* tokens, int64_t batch, int64_t heads, int64_t n,
                         int64_t width, const uint8_t* valid, int64_t valid_batch,
                         int64_t n_sides, const int64_t* sides, const Rows* means,
                         int64_t threads) {
  const int64_t blocks = (n + sides[0] - 1) / sides[0];
#pragma omp parallel num_threads(threads) if (batch * heads * n * width > SMALL)
  {
    std::vector<float> sums(n_sides * width, 0.0f);
    std::vector<int64_t> counts(n_sides, 0);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < batch * heads * blocks; ++t) {
      const int64_t b = t / blocks / heads, h = t / blocks % heads;
      const int64_t low = t % blocks * sides[0], high = std::min(low + sides[0], n);
      for (int64_t i = low; i < high; ++i) {
        float* finest = &sums[(n_sides - 1) * width];
        if (!valid || valid[b * valid_batch + i]) {
          const float* token = row_of(*tokens, b, h, i);
          for (int64_t d = 0; d < width; ++d) finest[d] += token[d];
          ++counts[n_sides - 1];
        }
        // Blocks that end here hand their sums on to the one they are part of.
        for (int64_t s = n_sides - 1; s >= 0; --s) {
          if ((i + 1) % sides[s] && i + 1 < high) break;
          float* sum = &sums[s * width];
          float* mean = const_cast<float*>(row_of(means[s], b, h, i / sides[s]));
          const float size = static_cast<float>(std::max<int64_t>(counts[s], 1));
          for (int64_t d = 0; d < width; ++d) {
            mean[d] = sum[d] / size;
            if (s) sum[d - width] += sum[d];
            sum[d] = 0;
          }
          if (s) counts[s - 1] += counts[s];
          counts[s] = 0;
        }
      }
    }
  }
}
