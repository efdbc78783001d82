// The weight's gradient of a grouped 2-D convolution, channels last; see grouped.py.
//
//   out[o, r, s, i] = sum_p grad_output[p, o] * input[p * stride - padding + (r, s) * dilation, i]
//
// o being a kept channel and i an input channel of its group. Vectors hold input channels, so that
// the arithmetic is in proportion to the kept channels. Each row of grad_output meets each row of
// input that it reads while that is in the cache; a tile of sums, some kept channels by some taps,
// stays in registers for a row.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

template <int LANES>
struct Lanes;
#define DEFINE_LANES(N)                                           \
  template <>                                                     \
  struct Lanes<N> {                                               \
    typedef float Float __attribute__((vector_size(N * 4)));      \
    typedef uint32_t Word __attribute__((vector_size(N * 4)));    \
    typedef uint16_t Half __attribute__((vector_size(N * 2)));    \
  }
DEFINE_LANES(4);
DEFINE_LANES(8);
DEFINE_LANES(16);
#undef DEFINE_LANES

// Registers for a tile of sums, kept channels by taps, and what each of them holds.
#ifdef __AVX512F__
constexpr int MAX_KEPT = 8, MAX_LANES = 16;
#else
constexpr int MAX_KEPT = 4, MAX_LANES = 8;
#endif
constexpr int MAX_TAPS = 3;

struct BFloat16 {
  uint16_t bits;
};

template <int LANES>
inline typename Lanes<LANES>::Float load(const float* from) {
  typename Lanes<LANES>::Float lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <int LANES>
inline typename Lanes<LANES>::Float load(const BFloat16* from) {
  typename Lanes<LANES>::Half halves;
  std::memcpy(&halves, from, sizeof halves);
  auto words = __builtin_convertvector(halves, typename Lanes<LANES>::Word) << 16;
  typename Lanes<LANES>::Float lanes;
  std::memcpy(&lanes, &words, sizeof lanes);
  return lanes;
}

inline float value(float x) { return x; }

inline float value(BFloat16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

// In the order of grouped.py. Spaces and steps are in elements: height, then width.
struct Shape {
  int64_t samples, groups, kept, sources;
  int64_t input_space[2], output_space[2], kernel[2], stride[2], padding[2], dilation[2];
  int64_t channels() const { return groups * sources; }
  int64_t outputs() const { return groups * kept; }
  int64_t taps() const { return kernel[0] * kernel[1]; }
  // The output columns [first, last) at which tap s lies within the input.
  int64_t first(int64_t s) const {
    const int64_t before = padding[1] - s * dilation[1];
    return before <= 0 ? 0 : std::min(output_space[1], (before + stride[1] - 1) / stride[1]);
  }
  int64_t last(int64_t s) const {
    const int64_t left = input_space[1] - 1 + padding[1] - s * dilation[1];
    return left < 0 ? 0 : std::min(output_space[1], left / stride[1] + 1);
  }
};

// Sums over a stretch of a row, for a tile of kept channels and taps.
template <class T, int LANES, int KEPT, int TAPS>
void add_tile(const Shape& a, const T* input, const T* grad, int64_t count, float* out) {
  using Float = typename Lanes<LANES>::Float;
  const int64_t step = a.stride[1] * a.channels(), next_tap = a.dilation[1] * a.channels();
  const int64_t next_kept = a.taps() * a.sources, grad_step = a.outputs();
  Float sums[KEPT][TAPS] = {};
  for (int64_t p = 0; p < count; ++p, input += step, grad += grad_step) {
    Float taps[TAPS];
    for (int s = 0; s < TAPS; ++s) taps[s] = load<LANES>(input + s * next_tap);
    for (int j = 0; j < KEPT; ++j) {
      const float factor = value(grad[j]);
      for (int s = 0; s < TAPS; ++s) sums[j][s] += factor * taps[s];
    }
  }
  for (int j = 0; j < KEPT; ++j) {
    for (int s = 0; s < TAPS; ++s) {
      float* at = out + j * next_kept + s * a.sources;
      const Float sum = load<LANES>(at) + sums[j][s];
      std::memcpy(at, &sum, sizeof sum);
    }
  }
}

// The same for all kept channels of a group: in tiles of MAX_KEPT, then one for the rest.
template <class T, int LANES, int TAPS, int KEPT = MAX_KEPT>
void add_taps(
    const Shape& a, const T* input, const T* grad, int64_t count, float* out, int64_t kept) {
  if (count <= 0) return;
  for (; kept >= KEPT; kept -= KEPT, grad += KEPT, out += KEPT * a.taps() * a.sources)
    add_tile<T, LANES, KEPT, TAPS>(a, input, grad, count, out);
  if constexpr (KEPT > 1)
    if (kept) add_taps<T, LANES, TAPS, KEPT - 1>(a, input, grad, count, out, kept);
}

// One row of the output, one row of the input, one row of the kernel, some channels of a group.
template <class T, int LANES>
void add_row(const Shape& a, const T* input, const T* grad, float* out) {
  const auto column = [&](int64_t s, int64_t p) {
    return input + (p * a.stride[1] - a.padding[1] + s * a.dilation[1]) * a.channels();
  };
  for (int64_t s = 0; s < a.kernel[1];) {
    const int64_t taps = a.kernel[1] - s >= MAX_TAPS ? MAX_TAPS : 1;
    // Where all taps of the tile lie within the input; next to it, each tap by itself.
    int64_t first = 0, last = a.output_space[1];
    for (int64_t t = s; t < s + taps; ++t) {
      first = std::max(first, a.first(t));
      last = std::min(last, a.last(t));
    }
    last = std::max(first, last);
    for (int64_t t = s; t < s + taps; ++t) {
      const int64_t begin = a.first(t), end = a.last(t), rest = std::max(begin, last);
      float* at = out + t * a.sources;
      add_taps<T, LANES, 1>(
          a, column(t, begin), grad + begin * a.outputs(), std::min(first, end) - begin, at,
          a.kept);
      add_taps<T, LANES, 1>(
          a, column(t, rest), grad + rest * a.outputs(), end - rest, at, a.kept);
    }
    const auto add = taps == 1 ? add_taps<T, LANES, 1> : add_taps<T, LANES, MAX_TAPS>;
    add(a, column(s, first), grad + first * a.outputs(), last - first, out + s * a.sources,
        a.kept);
    s += taps;
  }
}

template <class T, int LANES>
void run(const Shape& a, const T* input, const T* grad, float* out, int64_t threads) {
  const int64_t size = a.outputs() * a.taps() * a.sources;
  const int64_t rows = a.samples * a.output_space[0], share = (rows + threads - 1) / threads;
  // One sum for each thread's share of the rows, added up in order: the same in every run.
  std::vector<float> partial(size * threads, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t end = std::min(rows, (thread + 1) * share);
    for (int64_t row = thread * share; row < end; ++row) {
      const int64_t sample = row / a.output_space[0], y = row % a.output_space[0];
      const T* grad_row = grad + row * a.output_space[1] * a.outputs();
      for (int64_t r = 0; r < a.kernel[0]; ++r) {
        const int64_t input_y = y * a.stride[0] - a.padding[0] + r * a.dilation[0];
        if (input_y < 0 || input_y >= a.input_space[0]) continue;
        const T* input_row =
            input + (sample * a.input_space[0] + input_y) * a.input_space[1] * a.channels();
        for (int64_t group = 0; group < a.groups; ++group) {
          float* sums = partial.data() + thread * size +
              (group * a.kept * a.kernel[0] + r) * a.kernel[1] * a.sources;
          for (int64_t i = 0; i < a.sources; i += LANES)
            add_row<T, LANES>(
                a, input_row + group * a.sources + i, grad_row + group * a.kept, sums + i);
        }
      }
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    float sum = 0.0f;
    for (int64_t thread = 0; thread < threads; ++thread) sum += partial[thread * size + i];
    out[i] = sum;
  }
}

template <class T>
void run(const Shape& a, const void* input, const void* grad, float* out, int64_t threads) {
  const auto widest = a.sources % MAX_LANES == 0 ? run<T, MAX_LANES>
      : a.sources % 8 == 0                       ? run<T, 8>
                                                 : run<T, 4>;
  widest(a, static_cast<const T*>(input), static_cast<const T*>(grad), out, threads);
}

}  // namespace

extern "C" void grouped_grad_weight(
    const int64_t* shape, const void* input, const void* grad, float* out, int64_t is_bfloat16,
    int64_t threads) {
  Shape a;
  static_assert(sizeof a == 16 * sizeof *shape);
  std::memcpy(&a, shape, sizeof a);
  (is_bfloat16 ? run<BFloat16> : run<float>)(a, input, grad, out, threads);
}
