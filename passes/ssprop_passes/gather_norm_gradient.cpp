// Channels gathered from a batch norm's gradient, channels last; see norm_gather.py.
//
//   out[n, p, j] = ((h - (x[n, p, c] - mean[j]) * projection[j]) - mean_g[j]) * scale[j],  c = at[j]
//
// with h = g[n, p, c], or g[n, p, c] * factor[n, j] + addend[n, j] where these are given, and 0 where a
// ReLU's output, if one is given, is not above zero. Tensors are float32 or bfloat16, and are read as
// the bits of either; what is one number a channel, or a sample and channel, is float32.

#include <omp.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// The bits of a number as those of a float32.
inline uint32_t widened(uint32_t bits) { return bits; }
inline uint32_t widened(uint16_t bits) { return static_cast<uint32_t>(bits) << 16; }

inline float number(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline void store(float value, uint32_t* to) { std::memcpy(to, &value, sizeof value); }

// Rounds to the nearest, and of two that are as near to the even one; NaN stays NaN.
inline void store(float value, uint16_t* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *to = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}

struct Sizes {
  int64_t samples, positions, channels, kept, threads;
};

template <typename Bits, bool MASKED, bool EXCITED>
void gather(
    const Sizes& sizes, const Bits* g, const Bits* relu, const Bits* x, const float* columns,
    const float* excitation, const int32_t* at, Bits* out) {
  const int64_t kept = sizes.kept;
  const float *scale = columns, *mean = scale + kept, *mean_g = mean + kept;
  const float* projection = mean_g + kept;
#pragma omp parallel for num_threads(sizes.threads) schedule(static) collapse(2)
  for (int64_t n = 0; n < sizes.samples; ++n)
    for (int64_t p = 0; p < sizes.positions; ++p) {
      const int64_t row = n * sizes.positions + p, first = row * sizes.channels;
      const float* factor = EXCITED ? excitation + n * kept : nullptr;
      const float* addend = EXCITED ? factor + sizes.samples * kept : nullptr;
      Bits* to = out + row * kept;
#pragma omp simd
      for (int64_t j = 0; j < kept; ++j) {
        uint32_t bits = widened(g[first + at[j]]);
        if (EXCITED) bits = bits_of(number(bits) * factor[j] + addend[j]);
        // A mask, as a branch or a choice would keep this loop from being vectorised.
        if (MASKED) bits &= -static_cast<uint32_t>(!(number(widened(relu[first + at[j]])) <= 0.0f));
        const float centred = number(widened(x[first + at[j]])) - mean[j];
        store((number(bits) - centred * projection[j] - mean_g[j]) * scale[j], to + j);
      }
    }
}

template <typename Bits>
void gather(
    const Sizes& sizes, const void* g, const void* relu, const void* x, const float* columns,
    const float* excitation, const int32_t* at, void* out) {
  const auto kernel = relu ? (excitation ? gather<Bits, true, true> : gather<Bits, true, false>)
                           : (excitation ? gather<Bits, false, true> : gather<Bits, false, false>);
  kernel(
      sizes, static_cast<const Bits*>(g), static_cast<const Bits*>(relu),
      static_cast<const Bits*>(x), columns, excitation, at, static_cast<Bits*>(out));
}

}  // namespace

extern "C" void gather_norm_gradient(
    const void* g, const void* relu, const void* x, const float* columns, const float* excitation,
    const int64_t* indices, void* out, int64_t samples, int64_t positions, int64_t channels,
    int64_t kept, int64_t is_single, int64_t threads) {
  const std::vector<int32_t> at(indices, indices + kept);
  (is_single ? gather<uint32_t> : gather<uint16_t>)(
      {samples, positions, channels, kept, threads}, g, relu, x, columns, excitation, at.data(),
      out);
}
