"""The C of `cpu_mla`: MLA over a latent cache for new tokens, from absorbing w_uk to un-absorbing w_uv; for `cpu_mla` alone.

Heads of all new tokens are the lanes of a vector when scores are made, and latents the lanes when these are summed, so that a block
of tokens is read from memory once, for both products, under a running softmax (DeepSeek-V2 paper, section 2.1). Everything is
summed in fp32; bf16 is multiplied in pairs where the processor can (AVX512_BF16). The shapes are at most as large as `decodes` lets
through, and strides count elements.
"""

SOURCE = r"""
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
enum { LANES = 16, COLUMNS = 4, TOKENS = 8, TILE = 4 };
#else
enum { LANES = 8, COLUMNS = 2, TOKENS = 6, TILE = 2 };
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PAIRS 1 /* of bf16 numbers are multiplied, and summed in fp32, by one instruction */
#else
#define PAIRS 0
#endif
enum { BLOCK = 64, ROWS = 4, GROUPS = 64 / LANES, WIDTH = 1024 };
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline)) /* what has the registers to itself */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vec load(const float *from) { return *(const loose *)from; }
INLINE void store(float *to, vec x) { *(loose *)to = x; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec either(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }
INLINE float total(vec x) {
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  return x[0];
}

INLINE float widened(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
/* To the nearest, ties to even. */
INLINE uint16_t narrowed(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}
/* One number, or LANES of them, of a tensor in bf16 or fp32. */
INLINE float number(const void *from, int64_t i, int bf16) {
  return bf16 ? widened(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}
INLINE vec numbers(const void *from, int64_t i, int bf16) {
  if (!bf16) return load((const float *)from + i);
  return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)from + i), ints) << 16);
}

/* e^x of x <= 0, to two units in the last place; 0 below -87. NaN stays. */
INLINE vec exponential(vec x) {
  ints tiny = x < splat(-87.f);
  x = either(tiny, splat(-87.f), x);
  vec shifted = x * 1.44269504f + 12582912.f, whole = shifted - 12582912.f; /* 1.5 * 2^23: what follows is rounded off */
  vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;             /* ln 2 in two parts */
  vec y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.f;
  vec power = (vec)(((ints)shifted << 23) + (127 << 23));
  return (vec)(~tiny & (ints)(y * power));
}

typedef struct {
  int64_t batch, heads, length, tokens, nope, rope, rank, value;
  int64_t q_nope[3], q_rope[3]; /* strides of batch, head and new token */
  int64_t latent[2], k_rope[2]; /* of batch and token */
  int64_t w_uk[2], w_uv[2];     /* of head and row */
  int64_t mask[2];              /* of batch and new token */
  int64_t out;                  /* of batch */
  int64_t bits, rope_bits;      /* 8 or 6: quantised. 0: not */
  int64_t splits, threads;
} shapes;

typedef struct {
  const void *q_nope, *q_rope, *latent, *k_rope, *w_uk, *w_uv;
  const float *scales, *rope_scales; /* of quantised ones, [batch, tokens] */
  const uint8_t *mask;               /* 0: hidden. No mask: every token sees all */
  void *out;
  float scaling;
} tensors;

#if PAIRS
INLINE __m512bh pairs(const void *from) { return (__m512bh)_mm512_loadu_si512(from); }
INLINE __m512bh same(const void *from) {
  int32_t bits;
  memcpy(&bits, from, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}
/* 32 columns of two rows that lie `apart`: the pairs of columns 0-3, 8-11, 16-19, 24-27, and of the others. */
INLINE void zipped(const uint16_t *row, int64_t apart, __m512bh *x) {
  __m512i first = _mm512_loadu_si512(row), second = _mm512_loadu_si512(row + apart);
  x[0] = (__m512bh)_mm512_unpacklo_epi16(first, second);
  x[1] = (__m512bh)_mm512_unpackhi_epi16(first, second);
}
/* The first or second 16 columns of what was summed over such pairs. */
INLINE vec unzipped(const __m512 *sum, int second) {
  const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  return (vec)_mm512_permutex2var_ps(sum[0], second ? back : front, sum[1]);
}
#endif

/* `rows` x [nope] at x + at[row], times w [nope, rank], four vectors of columns of it. */
INLINE void absorb_tile(const int rows, const void *x, const int64_t *at, const void *w, int64_t apart, int64_t nope,
                        float *to, int64_t rank, int bf16) {
#if PAIRS
  if (bf16) {
    __m512 sum[TILE][4];
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_ps();
    for (int64_t i = 0; i < nope; i += 2) {
      __m512bh y[4];
      for (int j = 0; j < 2; j++) zipped((const uint16_t *)w + i * apart + 32 * j, apart, y + 2 * j);
      for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], y[j], same((const uint16_t *)x + at[r] + i));
    }
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < 4; j++) store(to + r * rank + j * LANES, unzipped(sum[r] + (j & 2), j & 1));
    return;
  }
#endif
  vec sum[TILE][4];
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < 4; j++) sum[r][j] = (vec){0};
  for (int64_t i = 0; i < nope; i++) {
    vec y[4];
    for (int j = 0; j < 4; j++) y[j] = numbers(w, i * apart + j * LANES, bf16);
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < 4; j++) sum[r][j] += splat(number(x, at[r] + i, bf16)) * y[j];
  }
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < 4; j++) store(to + r * rank + j * LANES, sum[r][j]);
}

/* `rows` x [rank], in fp32 or bf16 pairs, times four rows of w [value, rank]. */
INLINE void project_tile(const int rows, const float *x, const void *w, int64_t apart, int64_t rank, float (*to)[4], int bf16) {
#if PAIRS
  if (bf16) {
    __m512 sum[TILE][4];
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < rank; k += 32) {
      __m512bh y[4];
      for (int j = 0; j < 4; j++) y[j] = pairs((const uint16_t *)w + j * apart + k);
      for (int r = 0; r < rows; r++) {
        __m512bh own = pairs((const uint16_t *)(x + r * rank) + k);
        for (int j = 0; j < 4; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], own, y[j]);
      }
    }
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < 4; j++) to[r][j] = _mm512_reduce_add_ps(sum[r][j]);
    return;
  }
#endif
  vec sum[TILE][4];
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < 4; j++) sum[r][j] = (vec){0};
  for (int64_t k = 0; k < rank; k += LANES) {
    vec y[4];
    for (int j = 0; j < 4; j++) y[j] = numbers(w, j * apart + k, bf16);
    for (int r = 0; r < rows; r++) {
      vec own = load(x + r * rank + k);
      for (int j = 0; j < 4; j++) sum[r][j] += own * y[j];
    }
  }
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < 4; j++) to[r][j] = total(sum[r][j]);
}

/* Scores [N][stride] of N tokens with G groups of LANES rows, which lie as [K][LANES], `width` from each other. */
INLINE void score_tile(const int G, const int N, const float *q, int64_t width, const float *latent, int64_t apart,
                       const float *k_rope, int64_t k_apart, int64_t rank, int64_t rope, float *to, int64_t stride) {
  vec sum[2][TOKENS];
  for (int g = 0; g < G; g++)
    for (int t = 0; t < N; t++) sum[g][t] = (vec){0};
  for (int part = 0; part < 2; part++, latent = k_rope, apart = k_apart, rank = rope)
    for (int64_t k = 0; k < rank; k++, q += LANES)
      for (int t = 0; t < N; t++) {
        vec x = splat(latent[t * apart + k]);
        for (int g = 0; g < G; g++) sum[g][t] += x * load(q + g * width);
      }
  for (int g = 0; g < G; g++)
    for (int t = 0; t < N; t++) store(to + t * stride + g * LANES, sum[g][t]);
}

#if PAIRS
/* The same in pairs: [K / 2][LANES]. */
INLINE void score_pairs_tile(const int G, const int N, const float *q, int64_t width, const uint16_t *latent, int64_t apart,
                             const uint16_t *k_rope, int64_t k_apart, int64_t rank, int64_t rope, float *to,
                             int64_t stride) {
  __m512 sum[2][TOKENS];
  for (int g = 0; g < G; g++)
    for (int t = 0; t < N; t++) sum[g][t] = _mm512_setzero_ps();
  for (int part = 0; part < 2; part++, latent = k_rope, apart = k_apart, rank = rope)
    for (int64_t k = 0; k < rank; k += 2, q += LANES)
      for (int t = 0; t < N; t++) {
        __m512bh x = same(latent + t * apart + k);
        for (int g = 0; g < G; g++) sum[g][t] = _mm512_dpbf16_ps(sum[g][t], pairs(q + g * width), x);
      }
  for (int g = 0; g < G; g++)
    for (int t = 0; t < N; t++) _mm512_storeu_ps(to + t * stride + g * LANES, sum[g][t]);
}
#endif

#define SCORES(NAME, TYPE, G, N)                                                                                       \
  APART void NAME##_##G##_##N(const float *q, int64_t width, const TYPE *latent, int64_t apart, const TYPE *k_rope,    \
                              int64_t k_apart, int64_t rank, int64_t rope, float *to, int64_t stride) {               \
    NAME##_tile(G, N, q, width, latent, apart, k_rope, k_apart, rank, rope, to, stride);                               \
  }
/* All scores of n tokens with `groups`. The last tile begins early, where it would not be full. */
#define ALL_SCORES(NAME, TYPE)                                                                                         \
  SCORES(NAME, TYPE, 1, 1) SCORES(NAME, TYPE, 2, 1) SCORES(NAME, TYPE, 1, TOKENS) SCORES(NAME, TYPE, 2, TOKENS)        \
  APART void NAME##_all(const float *q, int64_t width, int64_t groups, const TYPE *latent, int64_t apart,                 \
                     const TYPE *k_rope, int64_t k_apart, int64_t rank, int64_t rope, float *to, int64_t n) {          \
    const int64_t stride = groups * LANES;                                                                             \
    for (int64_t g = 0; g < groups; g += 2, q += 2 * width, to += 2 * LANES)                                           \
      for (int64_t i = 0; i < n; i += n < TOKENS ? 1 : TOKENS) {                                                       \
        int64_t t = n >= TOKENS && i + TOKENS > n ? n - TOKENS : i;                                                    \
        __typeof__(&NAME##_1_1) tile = n < TOKENS ? (g + 1 < groups ? NAME##_2_1 : NAME##_1_1)                         \
                                                  : (g + 1 < groups ? NAME##_2_TOKENS : NAME##_1_TOKENS);              \
        tile(q, width, latent + t * apart, apart, k_rope + t * k_apart, k_apart, rank, rope, to + t * stride, stride); \
      }                                                                                                                \
  }
ALL_SCORES(score, float)
#if PAIRS
ALL_SCORES(score_pairs, uint16_t)
#endif

/* ROWS of context [rank], COLUMNS vectors of them: times decay, plus weights [tokens][stride] times latents. */
APART void gather(const float *weights, int64_t stride, const float *latent, int64_t apart, int64_t tokens, float *context,
                  int64_t rank, const float *decay) {
  vec sum[ROWS][COLUMNS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < COLUMNS; j++) sum[i][j] = decay[i] * load(context + i * rank + j * LANES);
  for (int64_t t = 0; t < tokens; t++, weights += stride, latent += apart) {
    vec x[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) x[j] = load(latent + j * LANES);
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < COLUMNS; j++) sum[i][j] += splat(weights[i]) * x[j];
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < COLUMNS; j++) store(context + i * rank + j * LANES, sum[i][j]);
}

#if PAIRS
/* The same with pairs of weights, [tokens / 2][stride]; the second weight behind an odd number of tokens is 0. */
APART void gather_pairs(const uint32_t *weights, int64_t stride, const uint16_t *latent, int64_t apart, int64_t tokens,
                        float *context, int64_t rank, const float *decay) {
  __m512 sum[ROWS][4];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_ps();
  for (int64_t t = 0; t < tokens; t += 2, weights += stride, latent += 2 * apart) {
    __m512bh x[4];
    for (int j = 0; j < 2; j++) zipped(latent + 32 * j, t + 1 < tokens ? apart : 0, x + 2 * j);
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < 4; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x[j], same(weights + i));
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < 4; j++) {
      float *to = context + i * rank + j * LANES;
      store(to, decay[i] * load(to) + unzipped(sum[i] + (j & 2), j & 1));
    }
}
/* Pairs of weights of two tokens. */
INLINE __m512i paired(vec first, vec second) {
  __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

/* How many numbers stand in 32 bits where two of them are multiplied at once. */
#define EACH(bf16) (bf16 && PAIRS ? 2 : 1)

/* What is written lies before what is read next: `to` may be `from`. */
INLINE void narrow(const float *from, void *to, int64_t n) {
  int64_t i = 0;
#if PAIRS
  for (; i + LANES <= n; i += LANES)
    _mm256_storeu_si256((__m256i *)((uint16_t *)to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
  for (; i < n; i++) {
    uint16_t x = narrowed(from[i]);
    memcpy((uint16_t *)to + i, &x, 2);
  }
}

/* Times an orthogonal, symmetric matrix, Sylvester's in blocks of the largest power of two that divides n. */
APART void rotate(float *x, int64_t n) {
  const int64_t block = n & -n;
  for (int64_t half = 1; half < block; half *= 2)
    for (int64_t i = 0; i < n; i += 2 * half)
      for (int64_t j = i; j < i + half; j++) {
        float one = x[j], other = x[j + half];
        x[j] = one + other, x[j + half] = one - other;
      }
  const float scale = 1 / sqrtf(block);
  for (int64_t i = 0; i < n; i++) x[i] *= scale;
}

/* absorbed [batch, heads * length, rank / EACH] of one head: its queries times w_uk, scaled. */
INLINE void absorb(const shapes *s, const tensors *of, float *absorbed, int64_t head, int bf16) {
  const int64_t rows = s->batch * s->length;
  float own[TILE * WIDTH];
  for (int64_t row = 0; row < rows;) {
    const int n = rows - row < TILE ? 1 : TILE;
    int64_t at[TILE];
    for (int r = 0; r < n; r++)
      at[r] = (row + r) / s->length * s->q_nope[0] + head * s->q_nope[1] + (row + r) % s->length * s->q_nope[2];
    for (int64_t column = 0; column < s->rank; column += 4 * LANES) {
      const void *w = (const char *)of->w_uk + (head * s->w_uk[0] + column) * (bf16 ? 2 : 4);
      if (n == TILE) absorb_tile(TILE, of->q_nope, at, w, s->w_uk[1], s->nope, own + column, s->rank, bf16);
      else absorb_tile(1, of->q_nope, at, w, s->w_uk[1], s->nope, own + column, s->rank, bf16);
    }
    for (int r = 0; r < n; r++, row++) {
      const int64_t b = row / s->length, m = row % s->length;
      float *x = own + r * s->rank, *to = absorbed + ((b * s->heads + head) * s->length + m) * s->rank / EACH(bf16);
      if (s->bits) rotate(x, s->rank);
      for (int64_t k = 0; k < s->rank; k += LANES) store(x + k, of->scaling * load(x + k));
      if (EACH(bf16) == 2) narrow(x, to, s->rank);
      else memcpy(to, x, s->rank * 4);
    }
  }
}

/* What is absorbed, [rows][rank], and q_rope of a group of rows as [rank + rope][LANES], a part of four of it. */
INLINE void pack(const shapes *s, const tensors *of, const float *absorbed, float *to, int64_t b, int64_t group, int part,
                 int bf16) {
  const int64_t all = s->heads * s->length, words = s->rank / EACH(bf16), from = part * words / 4;
  const float *own = absorbed + (b * all + group * LANES) * words;
  const int lanes = all - group * LANES < LANES ? all - group * LANES : LANES;
  for (int64_t k = from; k < from + words / 4; k++) {
    for (int lane = 0; lane < lanes; lane++) to[k * LANES + lane] = own[lane * words + k];
    for (int lane = lanes; lane < LANES; lane++) to[k * LANES + lane] = 0;
  }
  to += words * LANES;
  for (int lane = 0; lane < LANES && !part; lane++) {
    const int64_t row = group * LANES + lane;
    const int64_t at = b * s->q_rope[0] + row / s->length * s->q_rope[1] + row % s->length * s->q_rope[2];
    float rope[WIDTH] = {0};
    for (int64_t k = 0; k < s->rope && lane < lanes; k++) rope[k] = of->scaling * number(of->q_rope, at + k, bf16);
    if (s->rope_bits) rotate(rope, s->rope);
    if (EACH(bf16) == 2) narrow(rope, rope, s->rope);
    for (int64_t k = 0; k < s->rope / EACH(bf16); k++) to[k * LANES + lane] = rope[k];
  }
}

/* Codes [n] of 8 or 6 bits, as signed bytes: where they lie, or unpacked to `room`. Of six bits, a byte has one number in its lower
   bits, and the upper bits of three bytes are a fourth. */
INLINE const int8_t *codes(const void *from, int64_t at, int64_t bits, int64_t n, uint8_t *restrict room) {
  const uint8_t *restrict x = (const uint8_t *)from + at;
  if (bits == 8) return (const int8_t *)x;
  const int64_t quarter = (n + 3) / 4;
  for (int64_t i = 0; i < 3 * quarter; i++) room[i] = x[i] << 2;
  for (int64_t i = 0; i < quarter; i++)
    room[3 * quarter + i] = (x[i] & 0xc0) | (x[quarter + i] >> 2 & 0x30) | (x[2 * quarter + i] >> 4 & 0x0c);
  return (const int8_t *)room;
}

/* A token's latent and rope key [rank + rope] as they are multiplied, in fp32 or bf16. Quantised latents are codes, whose scale
   comes later: rope keys are divided by it. */
APART void prepare(const shapes *s, const tensors *of, int64_t b, int64_t t, float scale, void *to, int bf16) {
  const int64_t at = b * s->latent[0] + t * s->latent[1], k_at = b * s->k_rope[0] + t * s->k_rope[1];
  uint8_t room[WIDTH + 4];
  float own[WIDTH], *x = EACH(bf16) == 2 ? own : (float *)to, *rope = x + s->rank;
  if (s->bits) {
    const int8_t *code = codes(of->latent, at, s->bits, s->rank, room);
    for (int64_t k = 0; k < s->rank; k++) x[k] = code[k];
  } else
    for (int64_t k = 0; k < s->rank; k += LANES) store(x + k, numbers(of->latent, at + k, bf16));
  float up = 1 / scale;
  if (s->rope_bits) {
    const int8_t *code = codes(of->k_rope, k_at, s->rope_bits, s->rope, room);
    up *= of->rope_scales[b * s->tokens + t];
    for (int64_t k = 0; k < s->rope; k++) rope[k] = code[k] * up;
  } else if (bf16)
    for (int64_t k = 0; k < s->rope; k++) rope[k] = widened(((const uint16_t *)of->k_rope)[k_at + k]) * up;
  else
    for (int64_t k = 0; k < s->rope; k++) rope[k] = ((const float *)of->k_rope)[k_at + k] * up;
  if (EACH(bf16) == 2) narrow(x, to, s->rank + s->rope);
}

/* The groups of rows from `first` to `last` meet the tokens from `begin` to `end`: contexts [rows][rank] that are not divided by
   `sums` yet, under the `largest` score of each row. */
INLINE void attend(const shapes *s, const tensors *of, const float *q, float *contexts, float *largest, float *sums,
                   int64_t b, int64_t first, int64_t last, int64_t begin, int64_t end, int bf16) {
  const int64_t groups = last - first, stride = groups * LANES, K = s->rank + s->rope;
  const int64_t width = K / EACH(bf16) * LANES;
  float scores[BLOCK * GROUPS * LANES], decay[GROUPS * LANES], scales[BLOCK];
  const int as_they_are = !s->bits && (!bf16 || PAIRS);
  float prepared[as_they_are ? 1 : BLOCK * K / EACH(bf16)];
#if PAIRS
  uint32_t both[bf16 ? BLOCK / 2 * GROUPS * LANES : 1];
#endif
  for (int64_t i = 0; i < stride; i++) largest[i] = -FLT_MAX, sums[i] = 0;
  memset(contexts, 0, stride * s->rank * 4);
  for (int64_t start = begin; start < end; start += BLOCK) {
    const int64_t n = end - start < BLOCK ? end - start : BLOCK, size = bf16 && PAIRS ? 2 : 4;
    const void *latent = prepared, *k_rope = (const char *)prepared + s->rank * size;
    int64_t apart = K, k_apart = K;
    if (as_they_are) {
      latent = (const char *)of->latent + (b * s->latent[0] + start * s->latent[1]) * size, apart = s->latent[1];
      k_rope = (const char *)of->k_rope + (b * s->k_rope[0] + start * s->k_rope[1]) * size, k_apart = s->k_rope[1];
    }
    for (int64_t t = 0; t < n; t++) {
      scales[t] = s->bits ? of->scales[b * s->tokens + start + t] : 1;
      if (!as_they_are) prepare(s, of, b, start + t, scales[t], (char *)prepared + t * K * size, bf16);
    }
#if PAIRS
    if (bf16) score_pairs_all(q, width, groups, latent, apart, k_rope, k_apart, s->rank, s->rope, scores, n);
    else
#endif
      score_all(q, width, groups, latent, apart, k_rope, k_apart, s->rank, s->rope, scores, n);
    for (int64_t t = 0; t < n && s->bits; t++)
      for (int64_t i = 0; i < stride; i += LANES) store(scores + t * stride + i, scales[t] * load(scores + t * stride + i));
    for (int64_t m = 0; of->mask && m < s->length; m++) {
      const uint8_t *seen = of->mask + b * s->mask[0] + m * s->mask[1] + start;
      if (!memchr(seen, 0, n)) continue;
      for (int64_t i = (m + s->length - first * LANES % s->length) % s->length; i < stride; i += s->length)
        for (int64_t t = 0; t < n; t++)
          if (!seen[t]) scores[t * stride + i] = -FLT_MAX;
    }
    for (int64_t i = 0; i < stride; i += LANES) {
      vec before = load(largest + i), most = before, sum = {0};
      for (int64_t t = 0; t < n; t++) {
        vec x = load(scores + t * stride + i);
        most = either(x > most, x, most);
      }
      vec fall = exponential(before - most);
      for (int64_t t = 0; t < n; t += 2) {
        vec x = exponential(load(scores + t * stride + i) - most), y = {0};
        if (t + 1 < n) y = exponential(load(scores + (t + 1) * stride + i) - most);
        sum += x + y;
        x *= scales[t];
        if (t + 1 < n) y *= scales[t + 1];
#if PAIRS
        if (bf16) {
          _mm512_storeu_si512(both + t / 2 * stride + i, paired(x, y));
          continue;
        }
#endif
        store(scores + t * stride + i, x);
        if (t + 1 < n) store(scores + (t + 1) * stride + i, y);
      }
      store(sums + i, load(sums + i) * fall + sum);
      store(largest + i, most);
      store(decay + i, fall);
    }
    for (int64_t column = 0; column < s->rank; column += (EACH(bf16) == 2 ? 4 : COLUMNS) * LANES)
      for (int64_t i = 0; i < stride; i += ROWS) {
        float *to = contexts + i * s->rank + column;
#if PAIRS
        if (bf16) {
          gather_pairs(both + i, stride, (const uint16_t *)latent + column, apart, n, to, s->rank, decay + i);
          continue;
        }
#endif
        gather(scores + i, stride, (const float *)latent + column, apart, n, to, s->rank, decay + i);
      }
  }
}

/* Outputs of a head: the splits of its rows weighed, then times w_uv. */
INLINE void project(const shapes *s, const tensors *of, const float *contexts, const float *largest, const float *sums,
                    int64_t head, int64_t padded, int bf16) {
  const int64_t rows = s->batch * s->length;
  float own[TILE * WIDTH], to[TILE][4];
  for (int64_t row = 0; row < rows;) {
    const int n = rows - row < TILE ? 1 : TILE;
    for (int r = 0; r < n; r++) {
      const int64_t b = (row + r) / s->length, at = b * s->splits * padded + head * s->length + (row + r) % s->length;
      float most = -FLT_MAX, all = 0;
      for (int64_t i = 0; i < s->splits; i++) most = largest[at + i * padded] > most ? largest[at + i * padded] : most;
      for (int64_t i = 0; i < s->splits; i++) all += sums[at + i * padded] * expf(largest[at + i * padded] - most);
      for (int64_t k = 0; k < s->rank; k += LANES) store(own + r * s->rank + k, (vec){0});
      for (int64_t i = 0; i < s->splits; i++) {
        const vec share = splat(expf(largest[at + i * padded] - most) / all);
        for (int64_t k = 0; k < s->rank; k += LANES) {
          float *here = own + r * s->rank + k;
          store(here, load(here) + share * load(contexts + (at + i * padded) * s->rank + k));
        }
      }
      if (s->bits) rotate(own + r * s->rank, s->rank);
      if (EACH(bf16) == 2) narrow(own + r * s->rank, own + r * s->rank, s->rank);
    }
    for (int64_t v = 0; v < s->value; v += 4) {
      const void *w = (const char *)of->w_uv + (head * s->w_uv[0] + v * s->w_uv[1]) * (bf16 ? 2 : 4);
      if (n == TILE) project_tile(TILE, own, w, s->w_uv[1], s->rank, to, bf16);
      else project_tile(1, own, w, s->w_uv[1], s->rank, to, bf16);
      for (int r = 0; r < n; r++) {
        const int64_t b = (row + r) / s->length, m = (row + r) % s->length;
        const int64_t here = b * s->out + (head * s->length + m) * s->value + v;
        for (int j = 0; j < 4; j++) {
          if (bf16) ((uint16_t *)of->out)[here + j] = narrowed(to[r][j]);
          else ((float *)of->out)[here + j] = to[r][j];
        }
      }
    }
    row += n;
  }
}

INLINE void decode(const shapes *s, const tensors *of, float *room, int bf16) {
  const int64_t rows = s->heads * s->length, groups = (rows + LANES - 1) / LANES, padded = groups * LANES;
  const int64_t K = s->rank + s->rope, width = K / EACH(bf16) * LANES, parts = s->batch * s->splits;
  const int64_t chunks = (groups + GROUPS - 1) / GROUPS;
  float *absorbed = room, *packed = absorbed + s->batch * rows * s->rank, *contexts = packed + s->batch * padded * K;
  float *largest = contexts + parts * padded * s->rank, *sums = largest + parts * padded;
#pragma omp parallel num_threads(s->threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t head = 0; head < s->heads; head++) absorb(s, of, absorbed, head, bf16);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s->batch * groups * 4; i++) {
      const int64_t each = i / 4;
      pack(s, of, absorbed, packed + each * width, each / groups, each % groups, i % 4, bf16);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < parts * chunks; i++) {
      const int64_t part = i / chunks, b = part / s->splits, split = part % s->splits, first = i % chunks * GROUPS;
      const int64_t last = first + GROUPS < groups ? first + GROUPS : groups, at = part * padded + first * LANES;
      attend(s, of, packed + (b * groups + first) * width, contexts + at * s->rank, largest + at, sums + at, b, first, last,
             s->tokens * split / s->splits, s->tokens * (split + 1) / s->splits, bf16);
    }
#pragma omp for schedule(dynamic)
    for (int64_t head = 0; head < s->heads; head++) project(s, of, contexts, largest, sums, head, padded, bf16);
  }
}

void mla_decode(const shapes *s, const tensors *of, float *room, int64_t bf16) {
  if (bf16) decode(s, of, room, 1);
  else decode(s, of, room, 0);
}
/* 0: better left to others. */
int64_t mla_lanes(void) {
#if defined(_OPENMP) && defined(__AVX2__) && defined(__FMA__)
  return LANES;
#else
  return 0;
#endif
}
"""
