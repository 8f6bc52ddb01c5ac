"""Products of few tokens with block-FP8 weights, and with the chosen ones of many weights, on a CPU, in C.

PyTorch has no product with FP8: its operations pass over a weight some six times where one pass will do. Its products with one
expert after another read weights at half the rate of memory or less. Without a compiler the module still imports, and
`kernels_available()` is False.
"""

import ctypes
import functools

import torch

from .compiler import compiled

SOURCE = r"""
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
enum { TILE = 4 }; /* tokens that a weight is read for at a time */
enum { FP8, BF16, FP32 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vec numbers(const void *from, int64_t i, const int bfloat16) {
  if (!bfloat16) return *(const loose *)((const float *)from + i);
  return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)from + i), words) << 16);
}
INLINE float number(const void *from, int64_t i, const int bfloat16) {
  if (!bfloat16) return ((const float *)from)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* E4M3: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f is NaN, there is no infinity. */
static float TABLE[256];

__attribute__((constructor)) static void fill(void) {
  for (int code = 0; code < 256; code++) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float value = exponent ? 1 + mantissa / 8.f : mantissa / 8.f;
    for (int e = exponent ? exponent : 1; e < 7; e++) value /= 2;
    for (int e = exponent; e > 7; e--) value *= 2;
    if ((code & 127) == 127) value = __builtin_nanf("");
    TABLE[code] = code & 128 ? -value : value;
  }
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define WIDE 32
typedef struct { __m256 part[4]; } floats;

static inline __m256i load(const uint8_t *codes) { return _mm256_loadu_si256((const __m256i *)codes); }

/* 0xff where a code is NaN, which `decode` does not know. */
static inline __m256i nans(__m256i codes) {
  __m256i code = _mm256_set1_epi8(0x7f);
  return _mm256_cmpeq_epi8(_mm256_and_si256(codes, code), code);
}

/* 32 values times 2^-8: the bits of E4M3 moved up by 7 are fp16, whose bias is 15. */
static inline floats decode(__m256i codes) {
  floats values;
  for (int half = 0; half < 2; half++) {
    __m128i own = half ? _mm256_extracti128_si256(codes, 1) : _mm256_castsi256_si128(codes);
    __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(own), 7);
    bits = _mm256_andnot_si256(_mm256_set1_epi16(0x4000), bits);
    values.part[2 * half] = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
    values.part[2 * half + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
  }
  return values;
}

static inline float total(__m256 x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#endif

/* One row of `inner` codes times rows of x: y[t] for each. A group of columns shares a scale. */
INLINE void row(const int tokens, const uint8_t *codes, const float *scales, const float *x, float *y, int64_t inner,
                int64_t group, int64_t y_stride) {
  float sums[TILE] = {0};
#ifdef WIDE
  /* With one token, four sums that do not wait for each other; with more, two each: there are 16 registers. */
  const int apart = tokens == 1 ? 4 : 2;
  __m256 wide[TILE];
  for (int t = 0; t < tokens; t++) wide[t] = _mm256_setzero_ps();
#endif
  for (int64_t start = 0; start < inner; start += group, scales++) {
    int64_t i = start, end = start + group < inner ? start + group : inner;
    float part[TILE] = {0};
#ifdef WIDE
    __m256 sum[TILE][4];
    __m256i bad = _mm256_setzero_si256();
    for (int t = 0; t < tokens; t++)
      for (int s = 0; s < apart; s++) sum[t][s] = _mm256_setzero_ps();
    for (; i + WIDE <= end; i += WIDE) {
      __m256i raw = load(codes + i);
      floats w = decode(raw);
      bad = _mm256_or_si256(bad, nans(raw));
      for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 4; p++)
          sum[t][p % apart] = _mm256_fmadd_ps(w.part[p], _mm256_loadu_ps(x + t * inner + i + 8 * p), sum[t][p % apart]);
    }
    if (!_mm256_testz_si256(bad, bad)) i = start; /* all of the group from the table */
    else
      for (int t = 0; t < tokens; t++) {
        for (int s = 1; s < apart; s++) sum[t][0] = _mm256_add_ps(sum[t][0], sum[t][s]);
        wide[t] = _mm256_fmadd_ps(sum[t][0], _mm256_set1_ps(*scales), wide[t]);
      }
#endif
    for (; i < end; i++)
      for (int t = 0; t < tokens; t++) part[t] += TABLE[codes[i]] * x[t * inner + i];
    for (int t = 0; t < tokens; t++) sums[t] += part[t] * *scales;
  }
  for (int t = 0; t < tokens; t++) {
#ifdef WIDE
    sums[t] += 256 * total(wide[t]);
#endif
    y[t * y_stride] = sums[t];
  }
}

/* The same for a row of weights in fp32, or in bf16. */
INLINE void plain_row(const int tokens, const int bfloat16, const void *weights, const float *x, float *y, int64_t inner,
                      int64_t y_stride) {
  const int64_t size = bfloat16 ? 2 : 4;
  vec sums[TILE][2];
  for (int t = 0; t < tokens; t++) sums[t][0] = sums[t][1] = (vec){0};
  int64_t i = 0;
  for (; i + 2 * LANES <= inner; i += 2 * LANES) {
    for (int64_t line = 0; line < 2 * LANES * size; line += 64) __builtin_prefetch((const char *)weights + i * size + line + 4096);
    for (int p = 0; p < 2; p++) {
      vec w = numbers(weights, i + p * LANES, bfloat16);
      for (int t = 0; t < tokens; t++) sums[t][p] += w * numbers(x, t * inner + i + p * LANES, 0);
    }
  }
  for (int t = 0; t < tokens; t++) {
    vec both = sums[t][0] + sums[t][1];
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += both[lane];
    for (int64_t j = i; j < inner; j++) sum += number(weights, j, bfloat16) * x[t * inner + j];
    y[t * y_stride] = sum;
  }
}

/* Both for x in bf16, by products of pairs. E4M3 fits in bf16: both bytes of 64 values come from tables of 128. */
#if defined(WIDE) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define PAIRS 1
typedef struct { __m512i part[2][2]; } tables;

static inline tables bytes_of_bfloat16(void) {
  uint8_t bytes[2][128];
  for (int code = 0; code < 128; code++) {
    uint32_t bits;
    memcpy(&bits, TABLE + code, 4);
    bytes[0][code] = bits >> 16;
    bytes[1][code] = bits >> 24;
  }
  tables found;
  for (int i = 0; i < 4; i++) found.part[i / 2][i % 2] = _mm512_loadu_si512(bytes[i / 2] + 64 * (i % 2));
  return found;
}

INLINE void pairs_row(const int tokens, const tables *of, const uint8_t *codes, const float *scales, const uint16_t *x,
                      float *y, int64_t inner, int64_t group, int64_t y_stride) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), sign = _mm512_set1_epi8((char)0x80);
  __m512 sums[TILE];
  for (int t = 0; t < tokens; t++) sums[t] = _mm512_setzero_ps();
  for (int64_t start = 0; start < inner; start += group, scales++) {
    int64_t end = start + group < inner ? start + group : inner;
    __m512 part[TILE][2];
    for (int t = 0; t < tokens; t++) part[t][0] = part[t][1] = _mm512_setzero_ps();
    for (int64_t i = start; i < end; i += 64) {
      uint64_t there = end - i < 64 ? ((uint64_t)1 << (end - i)) - 1 : ~(uint64_t)0;
      _mm_prefetch((const char *)codes + i + 1024, _MM_HINT_T0);
      __m512i raw = _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(there, codes + i));
      __m512i low = _mm512_permutex2var_epi8(of->part[0][0], raw, of->part[0][1]);
      __m512i high = _mm512_permutex2var_epi8(of->part[1][0], raw, of->part[1][1]);
      high = _mm512_or_si512(high, _mm512_and_si512(raw, sign));
      __m512bh w[2] = {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
      for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 2; p++) {
          __m512i own = _mm512_maskz_loadu_epi16((__mmask32)(there >> 32 * p), x + t * inner + i + 32 * p);
          part[t][p] = _mm512_dpbf16_ps(part[t][p], w[p], (__m512bh)own);
        }
    }
    for (int t = 0; t < tokens; t++)
      sums[t] = _mm512_fmadd_ps(_mm512_add_ps(part[t][0], part[t][1]), _mm512_set1_ps(*scales), sums[t]);
  }
  for (int t = 0; t < tokens; t++) y[t * y_stride] = _mm512_reduce_add_ps(sums[t]);
}

INLINE void plain_pairs_row(const int tokens, const uint16_t *weights, const uint16_t *x, float *y, int64_t inner,
                            int64_t y_stride) {
  __m512 sums[TILE][2];
  for (int t = 0; t < tokens; t++) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < inner; i += 64) {
    uint64_t there = inner - i < 64 ? ((uint64_t)1 << (inner - i)) - 1 : ~(uint64_t)0;
    for (int p = 0; p < 2; p++) {
      const int64_t at = i + 32 * p;
      const __mmask32 own = (__mmask32)(there >> 32 * p);
      _mm_prefetch((const char *)(weights + at) + 4096, _MM_HINT_T0);
      __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(own, weights + at);
      for (int t = 0; t < tokens; t++)
        sums[t][p] = _mm512_dpbf16_ps(sums[t][p], w, (__m512bh)_mm512_maskz_loadu_epi16(own, x + t * inner + at));
    }
  }
  for (int t = 0; t < tokens; t++) y[t * y_stride] = _mm512_reduce_add_ps(_mm512_add_ps(sums[t][0], sums[t][1]));
}
#else
#define PAIRS 0
typedef struct { int none; } tables;
static inline tables bytes_of_bfloat16(void) { return (tables){0}; }
#define pairs_row(...)
#define plain_pairs_row(...)
#endif

/* Whether x may be in bf16, which it may for weights in FP8 and bf16. */
int64_t takes_pairs(void) { return PAIRS; }

/* Whether weights that PyTorch multiplies as well are better met here. */
int64_t is_fast(void) {
#if defined(WIDE) && defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

#define MEET(TOKENS)                                                                                                   \
  if (kind == FP8 && pairs) pairs_row(TOKENS, &of, own, factors, (const uint16_t *)x + t * inner, to, inner, group, rows); \
  else if (kind == FP8) row(TOKENS, own, factors, (const float *)x + t * inner, to, inner, group, rows);               \
  else if (pairs) plain_pairs_row(TOKENS, (const uint16_t *)own, (const uint16_t *)x + t * inner, to, inner, rows);    \
  else if (kind == BF16) plain_row(TOKENS, 1, own, (const float *)x + t * inner, to, inner, rows);                     \
  else plain_row(TOKENS, 0, own, (const float *)x + t * inner, to, inner, rows);                                       \
  t += TOKENS;                                                                                                         \
  break;

/* Weights [*, rows, inner]; those in FP8 with scales [*, ceil(rows / group_rows), ceil(inner / group)]. x [n, inner] in fp32 or,
   for pairs, bf16; y [n, rows]: the tokens from starts[i] to starts[i + 1] meet the weight chosen[i]. */
void products(const uint8_t *weights, int64_t kind, const float *scales, const void *x, int64_t pairs, float *y,
              const int64_t *chosen, const int64_t *starts, int64_t number, int64_t rows, int64_t inner, int64_t stride,
              int64_t row_stride, int64_t group_rows, int64_t group, int64_t threads) {
  int64_t groups = (inner + group - 1) / group, row_groups = (rows + group_rows - 1) / group_rows;
  int64_t size = kind == FP8 ? 1 : kind == BF16 ? 2 : 4;
  const tables of = bytes_of_bfloat16();
#pragma omp parallel for schedule(guided) num_threads(threads)
  for (int64_t each = 0; each < number * rows; each++) {
    int64_t i = each / rows, r = each % rows;
    const uint8_t *own = weights + (chosen[i] * stride + r * row_stride) * size;
    const float *factors = kind == FP8 ? scales + (chosen[i] * row_groups + r / group_rows) * groups : scales;
    for (int64_t t = starts[i]; t < starts[i + 1];) {
      float *to = y + t * rows + r;
      switch (starts[i + 1] - t) {
        case 1: MEET(1)
        case 2: MEET(2)
        case 3: MEET(3)
        default: MEET(4)
      }
    }
  }
}

/* To the nearest, ties to even. */
static inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}
#ifdef WIDE
static inline __m256i to_bfloat16s(__m256 values) {
  __m256i bits = _mm256_castps_si256(values), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
  return _mm256_srli_epi32(rounded, 16);
}
#endif

/* The weight itself, each value times its scale in fp32, to fp32 or, rounded to nearest even, to bf16. */
void dequantize(const uint8_t *weight, const float *scales, void *out, int64_t bfloat16, int64_t rows, int64_t inner,
                int64_t weight_stride, int64_t group_rows, int64_t group, int64_t threads) {
  int64_t groups = (inner + group - 1) / group;
#pragma omp parallel for schedule(guided) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const uint8_t *codes = weight + row * weight_stride;
    const float *own = scales + row / group_rows * groups;
    for (int64_t start = 0; start < inner; start += group, own++) {
      int64_t i = start, end = start + group < inner ? start + group : inner;
      float scale = *own, *wide = (float *)out + row * inner;
      uint16_t *narrow = (uint16_t *)out + row * inner;
#ifdef WIDE
      __m256 factor = _mm256_set1_ps(scale), up = _mm256_set1_ps(256);
      for (; i + WIDE <= end; i += WIDE) {
        __m256i raw = load(codes + i), bad = nans(raw);
        if (!_mm256_testz_si256(bad, bad)) break;
        floats w = decode(raw);
        for (int p = 0; p < 4; p++) w.part[p] = _mm256_mul_ps(_mm256_mul_ps(w.part[p], up), factor);
        for (int p = 0; p < 4; p += 2) {
          if (bfloat16) {
            __m256i both = _mm256_packus_epi32(to_bfloat16s(w.part[p]), to_bfloat16s(w.part[p + 1]));
            _mm256_storeu_si256((__m256i *)(narrow + i + 8 * p), _mm256_permute4x64_epi64(both, 0xd8));
          } else {
            _mm256_storeu_ps(wide + i + 8 * p, w.part[p]);
            _mm256_storeu_ps(wide + i + 8 * p + 8, w.part[p + 1]);
          }
        }
      }
#endif
      for (; i < end; i++) {
        float value = TABLE[codes[i]] * scale;
        if (bfloat16) narrow[i] = to_bfloat16(value); else wide[i] = value;
      }
    }
  }
}
"""


@functools.cache
def _library(*flags: str) -> ctypes.CDLL | None:
    library = compiled(SOURCE, *flags)
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.products.argtypes = [pointer, number, pointer, pointer, number, *[pointer] * 3, *[number] * 8]
        library.dequantize.argtypes = [pointer] * 3 + [number] * 7
        library.products.restype = library.dequantize.restype = None
    return library


def kernels_available() -> bool:
    """Whether there are kernels; the first to ask waits about a second for the compiler."""
    return _library() is not None


def kernels_loaded() -> bool:
    """Whether somebody has asked before."""
    return _library.cache_info().currsize > 0


def kernels_fast() -> bool:
    """Whether there are kernels with AVX2 and threads."""
    return kernels_available() and bool(_library().is_fast())


def multiplies_pairs() -> bool:
    """Whether tokens in bf16 are multiplied as they are: by AVX512_BF16, and AVX512_VBMI, which makes bf16 of FP8.

    The processor then takes subnormal bf16, below 1e-38, for zero, as it does in PyTorch's matrix products.
    """
    return bool(_library().takes_pairs())


def fp8_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int]
) -> torch.Tensor:
    """`x` `[n, in]` times `weight` `[out, in]` in E4M3 with block scales in fp32: `[n, out]`, summed and returned in fp32.

    All are contiguous, but for rows of the weight. `x` is multiplied in fp32, or in bf16 as [`multiplies_pairs`] says.
    """
    return products(x, weight.unsqueeze(0), [0], [0, len(x)], scale.unsqueeze(0), block_size)


def products(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: list[int],
    starts: list[int],
    scales: torch.Tensor | None = None,
    block_size: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """[`fp8_product`] with `weights` `[E, out, in]`: rows `starts[i]` to `starts[i + 1]` of `x` meet `weights[chosen[i]]`.

    Without scales the weights are in bf16 or fp32.
    """
    kind = {torch.bfloat16: 1, torch.float32: 2}[weights.dtype] if scales is None else 0
    pairs = x.dtype == torch.bfloat16 and weights.dtype != torch.float32 and multiplies_pairs()
    x = x if pairs else x.float()
    output = torch.empty(x.shape[0], weights.shape[1], dtype=torch.float32, device="cpu")
    held, scale = weights.data_ptr(), None if scales is None else scales.data_ptr()
    integers = [(ctypes.c_int64 * len(each))(*each) for each in (chosen, starts)]
    sizes = (len(chosen), *weights.shape[1:], *weights.stride()[:2], *block_size, torch.get_num_threads())
    _library().products(held, kind, scale, x.data_ptr(), pairs, output.data_ptr(), *integers, *sizes)
    return output


def fp8_dequantize(weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], out: torch.Tensor) -> None:
    """Writes `weight` `[m, n]` in E4M3 times its block scales in fp32 to the contiguous `out`, in fp32 or bf16."""
    pointers = [tensor.data_ptr() for tensor in (weight, scale, out)]
    sizes = (*weight.shape, weight.stride(0), *block_size, torch.get_num_threads())
    _library().dequantize(*pointers, out.dtype == torch.bfloat16, *sizes)
