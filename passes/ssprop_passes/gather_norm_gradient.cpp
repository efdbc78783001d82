// Channels gathered from a batch norm's gradient, channels last; see norm_gather.py.
//
//   out[p, j] = ((g[p, c] - (x[p, c] - mean[j]) * projection[j]) - mean_g[j]) * scale[j],  c = at[j]
//
// with 0 for g[p, c] where a ReLU's output, if one is given, is not above zero.

#include <omp.h>

#include <cstdint>
#include <vector>

namespace {

template <bool MASKED>
void gather(
    const float* g, const float* relu, const float* x, const float* columns, const int32_t* at,
    float* out, int64_t positions, int64_t channels, int64_t kept, int64_t threads) {
  const float *scale = columns, *mean = scale + kept, *mean_g = mean + kept;
  const float* projection = mean_g + kept;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < positions; ++p) {
    const int64_t first = p * channels;
    float* row = out + p * kept;
#pragma omp simd
    for (int64_t j = 0; j < kept; ++j) {
      // Read whether it is masked or not: a branch would keep this loop from being vectorised.
      float value = g[first + at[j]];
      if (MASKED) value = relu[first + at[j]] <= 0.0f ? 0.0f : value;
      row[j] = (value - (x[first + at[j]] - mean[j]) * projection[j] - mean_g[j]) * scale[j];
    }
  }
}

}  // namespace

extern "C" void gather_norm_gradient(
    const float* g, const float* relu, const float* x, const float* columns,
    const int64_t* indices, float* out, int64_t positions, int64_t channels, int64_t kept,
    int64_t threads) {
  const std::vector<int32_t> at(indices, indices + kept);
  (relu ? gather<true> : gather<false>)(
      g, relu, x, columns, at.data(), out, positions, channels, kept, threads);
}
