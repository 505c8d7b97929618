// What both kernels share: vectors of floats, the exponential, and a small matrix product.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define WIDE 4
#else
#define LANES 8
#define WIDE 2
#endif
// Rows of a product that are computed at once; their sums, WIDE vectors each, and a row of B fill the registers.
#define TALL 6

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t whole_vector __attribute__((vector_size(4 * LANES), aligned(4)));

static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// e^x to one unit in the last place or two (Cephes); keeps NaN. Loops over it become vector instructions.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float magic = 12582912.0f;  // 1.5 x 2^23: adding it rounds to a whole number
    float n = x * 1.44269504f + magic;
    union { float f; int32_t i; } power = {.f = n};
    n -= magic;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    power.i = (power.i - 0x4b400000 + 127) << 23;
    return p * power.f;
}

static inline vector chosen(whole_vector where, vector a, vector b) {
    return (vector)((where & (whole_vector)a) | (~where & (whole_vector)b));
}

// The same of a whole vector, for loops that compilers leave as they are.
static inline vector exponentials(vector x) {
    const vector zero = {0}, lowest = zero - 87.0f, magic = zero + 12582912.0f;
    x = chosen(x < lowest, lowest, x);
    x = chosen(x > -lowest, -lowest, x);
    vector n = x * 1.44269504f + magic;
    whole_vector power = (((whole_vector)n) - 0x4b400000 + 127) << 23;
    n -= magic;
    vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vector)power;
}

static inline float sum_of(vector x) {
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

// C[m, n] = A[m, k] B[k, n], or added to C. A's entries lie `down` apart along m and `along` apart along k.
// B's and C's rows are whole vectors: n is a multiple of LANES.
__attribute__((always_inline)) static inline void tile(
    float *c, int64_t c_row, const float *a, int64_t down, int64_t along, const float *b, int64_t b_row,
    int64_t tall, int64_t k, int wide, int add) {
    const float *rows[TALL];
    vector sums[TALL][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < TALL; r++) {
        rows[r] = a + (r < tall ? r : tall - 1) * down;  // rows beyond the last repeat it, and are not stored
#pragma GCC unroll 8
        for (int w = 0; w < wide; w++) sums[r][w] = (vector){0};
    }
    for (int64_t i = 0; i < k; i++) {
        const vector *row = (const vector *)(b + i * b_row);
        vector y[WIDE];
#pragma GCC unroll 8
        for (int w = 0; w < wide; w++) y[w] = row[w];
#pragma GCC unroll 8
        for (int r = 0; r < TALL; r++) {
            float x = rows[r][i * along];
#pragma GCC unroll 8
            for (int w = 0; w < wide; w++) sums[r][w] += x * y[w];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TALL; r++)
        if (r < tall)
#pragma GCC unroll 8
            for (int w = 0; w < wide; w++) {
                vector *out = (vector *)(c + r * c_row) + w;
                *out = add ? *out + sums[r][w] : sums[r][w];
            }
}

static void product(
    float *c, int64_t c_row, const float *a, int64_t down, int64_t along, const float *b, int64_t b_row,
    int64_t m, int64_t n, int64_t k, int add) {
    for (int64_t j = 0; j < n; j += WIDE * LANES) {
        int64_t wide = (n - j) / LANES;
        for (int64_t i = 0; i < m; i += TALL) {
            int64_t tall = m - i < TALL ? m - i : TALL;
            float *to = c + i * c_row + j;
            const float *from = a + i * down;
            switch (wide < WIDE ? wide : WIDE) {
            case 1: tile(to, c_row, from, down, along, b + j, b_row, tall, k, 1, add); break;
            case 2: tile(to, c_row, from, down, along, b + j, b_row, tall, k, 2, add); break;
#if WIDE > 2
            case 3: tile(to, c_row, from, down, along, b + j, b_row, tall, k, 3, add); break;
            case 4: tile(to, c_row, from, down, along, b + j, b_row, tall, k, 4, add); break;
#endif
            }
        }
    }
}
