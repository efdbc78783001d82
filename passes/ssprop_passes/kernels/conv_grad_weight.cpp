// Weight gradient of a 2-D convolution, channels last; see conv_grad_weight.py.
//
//   out[o, r, s, i] = sum_p grad_output[p, o] * input[p * stride - padding + (r, s) * dilation, i]
//
// Here o is a kept channel and i an input channel of its group. Vectors hold input channels, so the
// arithmetic is proportional to the kept channels.
//
// The positions p are processed in pieces. Each piece is copied first: the input with zeros around
// it, and with a block of its channels side by side. A tile of sums then reads from the nearest
// cache. The tile itself, some kept channels by two vectors, stays in registers for the piece. If a
// group's input channels would leave much of two vectors empty, a tile's vectors are taps instead
// of neighbouring channels.

// Allows fused multiply-adds. Inductor's flags forbid them, to match eager results.
#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, REGISTERS = 24;
#else
constexpr int LANES = 8, REGISTERS = 12;
#endif
// Largest number of positions in a piece, if possible: its copies should stay in the nearest cache.
constexpr int64_t POSITIONS = 512;

typedef float Float __attribute__((vector_size(LANES * 4)));

struct BFloat16 {
  uint16_t bits;
};

inline float value(float x) { return x; }

inline float value(BFloat16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

inline Float load(const float* from) {
  Float lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <int SIZE>
inline void copy_one(const float* from, float* to) {
  std::memcpy(to, from, SIZE * sizeof *to);
}

template <int SIZE>
inline void copy_one(const BFloat16* from, float* to) {
  // A separate buffer, because `to` might overlap `from`.
  float values[SIZE];
#pragma GCC unroll 32
  for (int j = 0; j < SIZE; ++j) values[j] = value(from[j]);
  std::memcpy(to, values, sizeof values);
}

// Copies SIZE neighbours, `count` times.
template <class T, int SIZE>
void copy_all(const T* from, int64_t next, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i, from += next, to += SIZE) copy_one<SIZE>(from, to);
}

template <class T, int SIZE>
auto copy_of(int64_t size) {
  if constexpr (SIZE > 1)
    if (size < SIZE) return copy_of<T, SIZE - 1>(size);
  return copy_all<T, SIZE>;
}

// Fields in the order of conv_grad_weight.py. Pairs are height, then width, in elements.
struct Shape {
  int64_t samples, groups, kept, sources;
  int64_t input_space[2], output_space[2], kernel[2], stride[2], padding[2], dilation[2];
  int64_t channels() const { return groups * sources; }
  int64_t outputs() const { return groups * kept; }
  int64_t taps() const { return kernel[0] * kernel[1]; }
};

// Some rows of some samples of grad_output, and the copy of the input that they use.
struct Piece {
  int64_t sample, samples, row, rows, columns;
  // Sizes of the input's copy, and its steps from one sample, row or column of grad_output to the
  // next.
  int64_t height, width, next_sample, next_row, next_column;
  int64_t positions() const { return samples * rows * columns; }
};

// Adds to the sums of KEPT channels by LOADS vectors. The vectors lie `next_load` apart in the
// input's copy and `next_sum` apart in the sums.
template <int LOADS, int KEPT>
void add_tile(
    const Piece& piece, const float* input, const float* grad, int64_t next_load, float* sums,
    int64_t next_kept, int64_t next_sum) {
  Float tile[KEPT][LOADS] = {};
  for (int64_t n = 0; n < piece.samples; ++n)
    for (int64_t y = 0; y < piece.rows; ++y) {
      const float* from = input + n * piece.next_sample + y * piece.next_row;
      for (int64_t x = 0; x < piece.columns; ++x, from += piece.next_column, grad += KEPT) {
        Float loads[LOADS];
#pragma GCC unroll 4
        for (int i = 0; i < LOADS; ++i) loads[i] = load(from + i * next_load);
#pragma GCC unroll 16
        for (int j = 0; j < KEPT; ++j)
#pragma GCC unroll 4
          for (int i = 0; i < LOADS; ++i) tile[j][i] += grad[j] * loads[i];
      }
    }
#pragma GCC unroll 16
  for (int j = 0; j < KEPT; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < LOADS; ++i) {
      float* at = sums + j * next_kept + i * next_sum;
      const Float sum = load(at) + tile[j][i];
      std::memcpy(at, &sum, sizeof sum);
    }
}

using Tile = void (*)(
    const Piece&, const float*, const float*, int64_t, float*, int64_t, int64_t);

template <int LOADS, int KEPT>
Tile tile_of(int64_t kept) {
  if constexpr (KEPT > 1)
    if (kept < KEPT) return tile_of<LOADS, KEPT - 1>(kept);
  return add_tile<LOADS, KEPT>;
}

// A convolution and how its work is divided.
template <class T>
struct Job : Shape {
  const T *input, *grad;
  // A tile has two vectors of channels or, if narrow (few channels), a vector for each of up to
  // three taps.
  bool is_narrow;
  int64_t block, blocks, tile, tiles;
  // A kernel of size 1 reads only every `skip`-th position; these are neighbours in the copy.
  int64_t skip[2], step[2];
  int64_t rows, bands, stack, pieces;

  Job(const Shape& shape, const T* input, const T* grad)
      : Shape(shape), input(input), grad(grad) {
    const int64_t vectors = (sources + LANES - 1) / LANES;
    is_narrow = vectors == 1 || (vectors % 2 && vectors < 6 && kernel[1] % 3 == 0);
    block = is_narrow ? LANES : 2 * LANES;
    blocks = (sources + block - 1) / block;
    tile = REGISTERS / (is_narrow ? 3 : 2);
    tiles = (kept + tile - 1) / tile;
    for (int d = 0; d < 2; ++d) {
      skip[d] = kernel[d] == 1 ? stride[d] : 1;
      step[d] = stride[d] / skip[d];
    }
    const int64_t height = output_space[0], width = output_space[1];
    const int64_t most = std::min(height, std::max<int64_t>(1, POSITIONS / width));
    bands = (height + most - 1) / most;
    rows = (height + bands - 1) / bands;
    stack = std::min(samples, std::max<int64_t>(1, POSITIONS / (height * width)));
    pieces = (samples + stack - 1) / stack * bands;
  }

  int64_t pitch() const { return blocks * block; }
  int64_t sums() const { return outputs() * taps() * pitch(); }
  int64_t extent(int d, int64_t count) const {
    return (count - 1) * step[d] + (kernel[d] - 1) * dilation[d] + 1;
  }
  int64_t grad_copy() const { return stack * rows * output_space[1] * kept; }
  int64_t input_copy() const {
    return stack * extent(0, rows) * extent(1, output_space[1]) * block;
  }
  // Kept channels in tile t, which begins at a group's channel `first`: nearly equal for all tiles.
  int64_t tile_size(int64_t t, int64_t first) const {
    return (kept - first + tiles - t - 1) / (tiles - t);
  }

  Piece piece(int64_t number) const {
    Piece p;
    p.sample = number / bands * stack;
    p.samples = std::min(stack, samples - p.sample);
    p.row = number % bands * rows;
    p.rows = std::min(rows, output_space[0] - p.row);
    p.columns = output_space[1];
    p.height = extent(0, p.rows);
    p.width = extent(1, p.columns);
    p.next_column = step[1] * block;
    p.next_row = step[0] * p.width * block;
    p.next_sample = p.height * p.width * block;
    return p;
  }

  // Copies by tile, then by position.
  void copy_grad(const Piece& p, int64_t group, float* to) const {
    for (int64_t t = 0, first = 0; t < tiles; ++t) {
      const int64_t size = tile_size(t, first), count = p.rows * p.columns;
      const auto copy = copy_of<T, REGISTERS / 2>(size);
      for (int64_t n = p.sample; n < p.sample + p.samples; ++n, to += count * size) {
        const int64_t position = (n * output_space[0] + p.row) * p.columns;
        copy(grad + position * outputs() + group * kept + first, outputs(), count, to);
      }
      first += size;
    }
  }

  // Copies by sample, row and column, with zeros around. If channels do not fill the block, the
  // numbers after them are copied too; nobody reads their sums.
  void copy_input(const Piece& p, int64_t group, int64_t source, float* to) const {
    const T* const end = input + samples * input_space[0] * input_space[1] * channels();
    const int64_t next = skip[1] * channels();
    // Columns of the copy that lie within the input.
    const int64_t first = std::min(p.width, (padding[1] + skip[1] - 1) / skip[1]);
    const int64_t last =
        std::max(first, std::min(p.width, (input_space[1] - 1 + padding[1]) / skip[1] + 1));
    const auto copy = is_narrow ? copy_all<T, LANES> : copy_all<T, 2 * LANES>;
    for (int64_t n = p.sample; n < p.sample + p.samples; ++n)
      for (int64_t y = 0; y < p.height; ++y, to += p.width * block) {
        const int64_t input_y = (p.row * step[0] + y) * skip[0] - padding[0];
        if (input_y < 0 || input_y >= input_space[0]) {
          std::fill_n(to, p.width * block, 0.0f);
          continue;
        }
        std::fill_n(to, first * block, 0.0f);
        const T* from = input +
            ((n * input_space[0] + input_y) * input_space[1] + first * skip[1] - padding[1]) *
                channels() +
            group * sources + source;
        int64_t whole = last - first;
        while (whole && from + (whole - 1) * next + block > end) --whole;
        copy(from, next, whole, to + first * block);
        // At the end of the tensor, copy only the channels.
        for (int64_t x = first + whole; x < last; ++x)
          for (int64_t i = 0; i < std::min(block, sources - source); ++i)
            to[x * block + i] = value(from[(x - first) * next + i]);
        std::fill_n(to + last * block, (p.width - last) * block, 0.0f);
      }
  }

  // Adds all taps and kept channels of one block of one group.
  void add_block(
      const Piece& p, int64_t group, int64_t source, const float* x, const float* dy,
      float* sums) const {
    for (int64_t t = 0, first = 0; t < tiles; ++t) {
      const int64_t size = tile_size(t, first);
      for (int64_t r = 0; r < kernel[0]; ++r)
        for (int64_t s = 0; s < kernel[1];) {
          const float* from = x + (r * dilation[0] * p.width + s * dilation[1]) * block;
          float* at = sums +
              (((group * kept + first) * kernel[0] + r) * kernel[1] + s) * pitch() + source;
          const int64_t next_kept = taps() * pitch();
          if (!is_narrow) {
            tile_of<2, REGISTERS / 2>(size)(p, from, dy, LANES, at, next_kept, LANES);
            s += 1;
          } else if (kernel[1] - s >= 3) {
            tile_of<3, REGISTERS / 3>(size)(
                p, from, dy, dilation[1] * block, at, next_kept, pitch());
            s += 3;
          } else {
            tile_of<1, REGISTERS / 3>(size)(p, from, dy, 0, at, next_kept, 0);
            s += 1;
          }
        }
      dy += p.positions() * size;
      first += size;
    }
  }

  // Adds pieces [begin, end) of blocks [first, last); blocks count over all groups.
  void add(
      int64_t begin, int64_t end, int64_t first, int64_t last, float* x, float* dy,
      float* sums) const {
    for (int64_t number = begin; number < end; ++number) {
      const Piece p = piece(number);
      for (int64_t b = first; b < last; ++b) {
        const int64_t group = b / blocks, source = b % blocks * block;
        if (b == first || source == 0) copy_grad(p, group, dy);
        copy_input(p, group, source, x);
        add_block(p, group, source, x, dy, sums);
      }
    }
  }
};

template <class T>
void run(const Shape& shape, const void* input, const void* grad, float* out, int64_t threads) {
  const Job<T> job(shape, static_cast<const T*>(input), static_cast<const T*>(grad));
  // Threads divide the blocks. If there are too few, several threads take the same blocks, and
  // divide the pieces. Each of these has its own sums. They are added up in a fixed order, so that
  // every run gives the same result.
  const int64_t blocks = job.groups * job.blocks;
  int64_t parts = std::max<int64_t>(1, threads);
  while (threads % parts || (blocks % parts && blocks < 8 * parts)) --parts;
  const int64_t shares = std::min(job.pieces, threads / parts), size = job.sums();
  const bool is_direct = shares == 1 && job.pitch() == job.sources;
  std::vector<float> partial(is_direct ? 0 : shares * size);
  if (is_direct) std::memset(out, 0, size * sizeof *out);
  float* sums = is_direct ? out : partial.data();
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> x(job.input_copy()), dy(job.grad_copy());
#pragma omp for schedule(static, 1)
    for (int64_t i = 0; i < shares * parts; ++i) {
      const int64_t share = i / parts, part = i % parts;
      job.add(
          job.pieces * share / shares, job.pieces * (share + 1) / shares,
          blocks * part / parts, blocks * (part + 1) / parts, x.data(), dy.data(),
          sums + share * size);
    }
    if (!is_direct) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < job.outputs() * job.taps(); ++row)
        for (int64_t i = 0; i < job.sources; ++i) {
          float sum = 0.0f;
          for (int64_t share = 0; share < shares; ++share)
            sum += sums[share * size + row * job.pitch() + i];
          out[row * job.sources + i] = sum;
        }
    }
  }
}

}  // namespace

extern "C" void conv_grad_weight(
    const int64_t* shape, const void* input, const void* grad, float* out, int64_t is_bfloat16,
    int64_t threads) {
  Shape a;
  static_assert(sizeof a == 16 * sizeof *shape);
  std::memcpy(&a, shape, sizeof a);
  (is_bfloat16 ? run<BFloat16> : run<float>)(a, input, grad, out, threads);
}
