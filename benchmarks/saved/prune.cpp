// Keeps the largest numbers of every block of eight, and puts them back; see operators.py.
//
// Rows do not matter here: a tensor is a sequence of blocks. A mask has bit i for lane i of its
// block, and the kept numbers of a block follow each other in the order of their lanes.

#include <omp.h>

#include <cstdint>
#include <cstring>
#ifdef __AVX512VL__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;

// Lanes with fewer than `kept` lanes before them, in the order of magnitude; of equals the first.
template <typename Number, typename Word>
inline unsigned strongest(const Number* from, int kept) {
  typedef Number Numbers __attribute__((vector_size(LANES * sizeof(Number))));
  typedef Word Words __attribute__((vector_size(LANES * sizeof(Word))));
  Numbers signed_values;
  std::memcpy(&signed_values, from, sizeof signed_values);
  const Numbers values = signed_values < 0 ? -signed_values : signed_values;
  const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  Words before = lanes ^ lanes;
  for (int lane = 0; lane < LANES; ++lane) {
    before -= (values[lane] > values) | ((values[lane] == values) & (lanes > lane));
  }
  unsigned mask = 0;
#ifdef __AVX512VL__
  if constexpr (sizeof(Number) == 4) {
    const __m256i limit = _mm256_set1_epi32(kept);
    mask = _mm256_cmplt_epi32_mask((__m256i)before, limit);
  } else
#endif
  {
    for (int lane = 0; lane < LANES; ++lane) mask |= unsigned(before[lane] < kept) << lane;
  }
  // Not a number is before nothing and has nothing before it, so there may be too many.
  while (__builtin_popcount(mask) > kept) mask &= ~(1u << (31 - __builtin_clz(mask)));
  return mask;
}

template <typename Number>
inline void pack(const Number* from, unsigned mask, int kept, Number* to) {
#ifdef __AVX512VL__
  if constexpr (sizeof(Number) == 4) {
    const __m256 packed = _mm256_maskz_compress_ps(__mmask8(mask), _mm256_loadu_ps(from));
    _mm256_mask_storeu_ps(to, __mmask8((1u << kept) - 1), packed);
    return;
  }
#endif
  for (int lane = 0; lane < LANES; ++lane) {
    if (mask >> lane & 1) *to++ = from[lane];
  }
}

template <typename Number>
inline void unpack(const Number* from, unsigned mask, int kept, Number* to) {
#ifdef __AVX512VL__
  if constexpr (sizeof(Number) == 4) {
    const __m256 packed = _mm256_maskz_loadu_ps(__mmask8((1u << kept) - 1), from);
    _mm256_storeu_ps(to, _mm256_maskz_expand_ps(__mmask8(mask), packed));
    return;
  }
#endif
  for (int lane = 0; lane < LANES; ++lane) to[lane] = mask >> lane & 1 ? *from++ : Number(0);
}

template <typename Number, typename Word>
void prune_all(const Number* from, Number* to, uint8_t* masks, int64_t blocks, int kept) {
#pragma omp parallel for
  for (int64_t block = 0; block < blocks; ++block) {
    const unsigned mask = strongest<Number, Word>(from + block * LANES, kept);
    masks[block] = uint8_t(mask);
    pack(from + block * LANES, mask, kept, to + block * kept);
  }
}

template <typename Number>
void fill_all(const Number* from, const uint8_t* masks, Number* to, int64_t blocks, int kept) {
#pragma omp parallel for
  for (int64_t block = 0; block < blocks; ++block) {
    unpack(from + block * kept, masks[block], kept, to + block * LANES);
  }
}

}  // namespace

extern "C" void prune(const void* from, void* to, void* masks, int64_t blocks, int64_t kept,
                      int64_t bytes) {
  if (bytes == 4) {
    prune_all<float, int32_t>((const float*)from, (float*)to, (uint8_t*)masks, blocks, int(kept));
  } else {
    prune_all<double, int64_t>((const double*)from, (double*)to, (uint8_t*)masks, blocks,
                               int(kept));
  }
}

extern "C" void fill(const void* from, const void* masks, void* to, int64_t blocks, int64_t kept,
                     int64_t bytes) {
  if (bytes == 4) {
    fill_all((const float*)from, (const uint8_t*)masks, (float*)to, blocks, int(kept));
  } else {
    fill_all((const double*)from, (const uint8_t*)masks, (double*)to, blocks, int(kept));
  }
}
