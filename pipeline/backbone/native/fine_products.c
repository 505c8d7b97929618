// Products of int16 rows with a frozen int8 matrix, rescaled to floats in the same kernel.
//
// One instruction of AVX2 multiplies 16 pairs of int16 numbers and adds neighbours, which is twice what it does with
// floats. The matrix stays int8 in memory: a few of its rows at a time are widened in the first cache, where blocks of
// rows walk along them. So it is read once a block, in a quarter of the bytes that floats have.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__AVX2__)

int multiplies_int16(void) { return 0; }

void int16_product(
    const int16_t *x, const float *row_scale, const int8_t *weight, const float *columns, float *out, int64_t n,
    int64_t inner, int64_t deep, int64_t outer) {
    abort();
}

#else
#include <immintrin.h>

#define DEEP 16  // entries along the sum that one instruction takes
#define TALL 2   // rows of x, and
#define BROAD 6  // rows of the matrix, of which the sums fill the vector registers
#define ROWS 64  // rows of x that stay in the second cache

int multiplies_int16(void) { return 1; }

// One row of the matrix -> int16 [deep], zeros beyond its end.
static void widen(const int8_t *from, int16_t *to, int64_t inner, int64_t deep) {
    int64_t k = 0;
    for (; k + DEEP <= inner; k += DEEP)
        _mm256_store_si256((__m256i *)(to + k), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from + k))));
    for (; k < deep; k++) to[k] = k < inner ? from[k] : 0;
}

static inline int32_t sum_of_8(__m256i x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1));
    return _mm_cvtsi128_si32(y);
}

// `rows` (a constant, at most TALL) rows of x times BROAD rows of the matrix, of which `wide` are there.
__attribute__((always_inline)) static inline void multiply_block(
    const int16_t *x, const int16_t *w, int64_t deep, int rows, const float *row_scale, const float *columns, float *out,
    int64_t outer, int64_t wide) {
    __m256i sums[TALL][BROAD];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 6
        for (int c = 0; c < BROAD; c++) sums[r][c] = _mm256_setzero_si256();
    for (int64_t k = 0; k < deep; k += DEEP) {
        __m256i a[TALL];
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) a[r] = _mm256_loadu_si256((const __m256i *)(x + r * deep + k));
#pragma GCC unroll 6
        for (int c = 0; c < BROAD; c++) {
            __m256i b = _mm256_load_si256((const __m256i *)(w + c * deep + k));
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(a[r], b));
                // Keeps the order: all products first would not fit into the registers.
                __asm__ volatile("" : "+x"(sums[r][c]));
            }
        }
    }
    int32_t found[TALL][BROAD];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 6
        for (int c = 0; c < BROAD; c++) found[r][c] = sum_of_8(sums[r][c]);
    for (int r = 0; r < rows; r++)
        for (int64_t c = 0; c < wide; c++) out[r * outer + c] = (float)found[r][c] * columns[c] * row_scale[r];
}

// x [n, deep] times the matrix [outer, inner], rescaled by row and by column -> out [n, outer]. `deep` is `inner`, rounded
// up to a multiple of DEEP.
void int16_product(
    const int16_t *x, const float *row_scale, const int8_t *weight, const float *columns, float *out, int64_t n,
    int64_t inner, int64_t deep, int64_t outer) {
#pragma omp parallel
    {
        int16_t *w = aligned_alloc(64, (size_t)(BROAD * deep * 2 + 63) / 64 * 64);
        if (!w) abort();
#pragma omp for schedule(static) collapse(2)
        for (int64_t i = 0; i < n; i += ROWS)
            for (int64_t j = 0; j < outer; j += BROAD) {
                int64_t wide = outer - j < BROAD ? outer - j : BROAD, end = n - i < ROWS ? n : i + ROWS, r = i;
                for (int64_t c = 0; c < wide; c++) widen(weight + (j + c) * inner, w + c * deep, inner, deep);
                for (int64_t c = wide; c < BROAD; c++) memset(w + c * deep, 0, (size_t)deep * 2);
                for (; r + TALL <= end; r += TALL)
                    multiply_block(
                        x + r * deep, w, deep, TALL, row_scale + r, columns + j, out + r * outer + j, outer, wide);
                for (; r < end; r++)
                    multiply_block(
                        x + r * deep, w, deep, 1, row_scale + r, columns + j, out + r * outer + j, outer, wide);
            }
        free(w);
    }
}

#endif
