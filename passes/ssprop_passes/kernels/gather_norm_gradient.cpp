// Channels gathered from a batch norm's gradient, channels last; see gather_norm_gradient.py.
//
//   out[n, p, j] = ((h - (x[n, p, c] - mean[j]) * projection[j]) - mean_g[j]) * scale[j]
//
// with c = at[j]. Here h = g[n, p, c] or, if factor and addend are given,
// g[n, p, c] * factor[n, j] + addend[n, j].
// If the norm feeds a ReLU, h is 0 wherever the norm's output
//
//   (x[n, p, c] - mean[j]) * inverse_std[j] * weight[j] + bias[j]
//
// is zero or less. This output is rounded as in the forward. Tensors are float32 or bfloat16, and
// are read as bits. Values with one number per channel, or per sample and channel, are float32.

// Inductor's flags keep GCC from vectorising loops, even those marked `omp simd`.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")
#endif

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#if defined(__AVX512BW__) && defined(__AVX512VBMI2__)
#include <immintrin.h>
#define SSPROP_COMPRESSES
#endif

namespace {

// Converts the bits of a number to those of a float32.
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

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(float value, uint16_t* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *to = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}

struct Sizes {
  int64_t samples, positions, channels, kept, threads;
};

// Rows whose kept channels are picked before the arithmetic on them begins: overlapping stores
// should have reached the cache when they are read.
constexpr int64_t PICKED_ROWS = 16;

#ifdef SSPROP_COMPRESSES
constexpr bool CAN_PICK = true;
inline __m512i packed(uint32_t lanes, const uint16_t* from) {
  return _mm512_maskz_compress_epi16(lanes, _mm512_maskz_loadu_epi16(lanes, from));
}
inline __m512i packed(uint32_t lanes, const uint32_t* from) {
  return _mm512_maskz_compress_epi32(lanes, _mm512_maskz_loadu_epi32(lanes, from));
}
#else
constexpr bool CAN_PICK = false;
#endif

// Copies the kept channels of a row in memory order, one vector at a time.
template <typename Bits>
class Picker {
 public:
  static constexpr int64_t LANES = 64 / sizeof(Bits);

  Picker(const int32_t* at, int64_t kept) {
    for (int64_t j = 0; j < kept; ++j) {
      const int32_t first = at[j] / LANES * LANES;
      if (vectors_.empty() || vectors_.back().first != first) vectors_.push_back({first, 0});
      vectors_.back().lanes |= uint32_t{1} << (at[j] - first);
    }
  }

  // Writes up to LANES numbers more than the kept ones.
  void pick(const Bits* row, Bits* to) const {
#ifdef SSPROP_COMPRESSES
    for (const Vector& vector : vectors_) {
      _mm512_storeu_si512(to, packed(vector.lanes, row + vector.first));
      to += __builtin_popcount(vector.lanes);
    }
#endif
  }

 private:
  struct Vector {
    int32_t first;
    uint32_t lanes;
  };
  std::vector<Vector> vectors_;
};

template <typename Bits, bool MASKED, bool EXCITED, bool PICKED>
void gather(
    const Sizes& sizes, const Bits* g, const Bits* x, const float* columns, const float* excitation,
    const int32_t* at, Bits* out) {
  const int64_t kept = sizes.kept, rows = sizes.samples * sizes.positions;
  const float *scale = columns, *mean = scale + kept, *mean_g = mean + kept;
  const float *projection = mean_g + kept, *inverse_std = projection + kept;
  const float *weight = inverse_std + kept, *bias = weight + kept;
  const Picker<Bits> picker(at, PICKED ? kept : 0);
#pragma omp parallel num_threads(sizes.threads)
  {
    const int64_t room = PICKED ? PICKED_ROWS * kept + Picker<Bits>::LANES : 0;
    std::vector<Bits> picked(2 * room);
    Bits *g_picked = picked.data(), *x_picked = g_picked + room;
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < rows; begin += PICKED_ROWS) {
      const int64_t end = std::min(begin + PICKED_ROWS, rows);
      if (PICKED)
        for (int64_t row = begin; row < end; ++row) {
          picker.pick(g + row * sizes.channels, g_picked + (row - begin) * kept);
          picker.pick(x + row * sizes.channels, x_picked + (row - begin) * kept);
        }
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = PICKED ? (row - begin) * kept : row * sizes.channels;
        const Bits* g_row = (PICKED ? g_picked : g) + first;
        const Bits* x_row = (PICKED ? x_picked : x) + first;
        const float* factor = EXCITED ? excitation + row / sizes.positions * kept : nullptr;
        const float* addend = EXCITED ? factor + sizes.samples * kept : nullptr;
        Bits* to = out + row * kept;
#pragma omp simd if (PICKED)
        for (int64_t j = 0; j < kept; ++j) {
          const int64_t c = PICKED ? j : at[j];
          uint32_t bits = widened(g_row[c]);
          const float centred = number(widened(x_row[c])) - mean[j];
          if (EXCITED) bits = bits_of(number(bits) * factor[j] + addend[j]);
          if (MASKED) {
            const float activated = centred * inverse_std[j] * weight[j] + bias[j];
            // A bit mask, because a branch or a conditional would prevent vectorisation.
            bits &= -static_cast<uint32_t>(!(activated <= 0.0f));
          }
          store((number(bits) - centred * projection[j] - mean_g[j]) * scale[j], to + j);
        }
      }
    }
  }
}

template <typename Bits, bool MASKED, bool EXCITED>
auto kernel_of(bool is_picked) {
  return is_picked ? gather<Bits, MASKED, EXCITED, CAN_PICK> : gather<Bits, MASKED, EXCITED, false>;
}

template <typename Bits, bool MASKED>
auto kernel_of(bool is_excited, bool is_picked) {
  return is_excited ? kernel_of<Bits, MASKED, true>(is_picked)
                    : kernel_of<Bits, MASKED, false>(is_picked);
}

template <typename Bits>
void gather(
    const Sizes& sizes, const void* g, const void* x, const float* columns, const float* excitation,
    bool is_masked, const std::vector<int32_t>& at, void* out) {
  const bool is_picked = std::is_sorted(at.begin(), at.end(), std::less_equal<int32_t>());
  const auto kernel = is_masked ? kernel_of<Bits, true>(excitation, is_picked)
                                : kernel_of<Bits, false>(excitation, is_picked);
  kernel(
      sizes, static_cast<const Bits*>(g), static_cast<const Bits*>(x), columns, excitation,
      at.data(), static_cast<Bits*>(out));
}

}  // namespace

extern "C" void gather_norm_gradient(
    const void* g, const void* x, const float* columns, const float* excitation,
    const int64_t* indices, void* out, int64_t samples, int64_t positions, int64_t channels,
    int64_t kept, int64_t is_masked, int64_t is_single, int64_t threads) {
  const std::vector<int32_t> at(indices, indices + kept);
  (is_single ? gather<uint32_t> : gather<uint16_t>)(
      {samples, positions, channels, kept, threads}, g, x, columns, excitation, is_masked, at, out);
}
