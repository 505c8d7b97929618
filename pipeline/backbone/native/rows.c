// Token by token: what happens around the int8 products, each in one walk over memory.
#include "vectors.h"

#define SMALLEST 1e-30f
#define LEVELS 127.0f

// One row, times `columns` if given -> int8, and its scale. Where a row is not finite, its scale is none either.
__attribute__((always_inline)) static inline float quantize_row(
    const float *restrict row, const float *restrict columns, int8_t *restrict to, int64_t width) {
    const float magic = 12582912.0f;  // rounds half to even
    float largest = 0.0f, spoiled = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : spoiled)
    for (int64_t j = 0; j < width; j++) {
        float value = columns ? row[j] * columns[j] : row[j];
        float size = __builtin_fabsf(value);
        largest = size > largest ? size : largest;
        spoiled += value * 0.0f;
    }
    float step = (largest < SMALLEST ? SMALLEST : largest) / LEVELS;
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        float value = columns ? row[j] * columns[j] : row[j];
        float rounded = value / step + magic;
        to[j] = (int8_t)(int32_t)(rounded - magic);
    }
    return step + spoiled;
}

// x [n, width], times `columns` [width] if given -> int8 [n, width] and scale [n], x ~ int8 x scale.
void quantize_rows(const float *x, const float *columns, int8_t *out, float *scale, int64_t n, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        // Two calls: a choice within the loops would keep them from becoming vector instructions.
        if (columns)
            scale[i] = quantize_row(x + i * width, columns, out + i * width, width);
        else
            scale[i] = quantize_row(x + i * width, NULL, out + i * width, width);
    }
}

// One row -> int16 of at most `levels` by size, with zeros from `width` to `deep`, and its scale, as `quantize_row`.
__attribute__((always_inline)) static inline float quantize_fine_row(
    const float *restrict row, int16_t *restrict to, int64_t width, int64_t deep, float levels) {
    const float magic = 12582912.0f;
    float largest = 0.0f, spoiled = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : spoiled)
    for (int64_t j = 0; j < width; j++) {
        float size = __builtin_fabsf(row[j]);
        largest = size > largest ? size : largest;
        spoiled += row[j] * 0.0f;
    }
    float step = (largest < SMALLEST ? SMALLEST : largest) / levels, inverse = 1.0f / step;
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        float rounded = row[j] * inverse + magic;
        to[j] = (int16_t)(int32_t)(rounded - magic);
    }
    for (int64_t j = width; j < deep; j++) to[j] = 0;
    return step + spoiled;
}

// x [n, width] -> int16 [n, deep] and scale [n], x ~ int16 x scale.
void quantize_fine_rows(const float *x, int16_t *out, float *scale, float levels, int64_t n, int64_t width, int64_t deep) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) scale[i] = quantize_fine_row(x + i * width, out + i * deep, width, deep, levels);
}

// x [n, width], times `columns` [width] if given, in three digits: int8 [3, n, width] and scale [3, n], and x is nearly as
// exact as a float of 24 bits. Each digit is what is left of x in steps 254 times as small.
void quantize_digits(const float *x, const float *columns, int8_t *out, float *scale, int64_t n, int64_t width) {
    const float magic = 12582912.0f, finer = 254.0f;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float left[width];
        for (int64_t j = 0; j < width; j++) left[j] = columns ? x[i * width + j] * columns[j] : x[i * width + j];
        float own = quantize_row(left, NULL, out + i * width, width);
        // A row that is not finite has a first scale that is none, which is enough; its other digits say nothing.
        float step = own;
        scale[i] = own;
        for (int64_t digit = 1; digit < 3; digit++) {
            const int8_t *above = out + ((digit - 1) * n + i) * width;
            int8_t *to = out + (digit * n + i) * width;
            float next = step / finer;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                left[j] -= (float)above[j] * step;
                to[j] = (int8_t)(int32_t)(left[j] / next + magic - magic);
            }
            scale[digit * n + i] = step = next;
        }
    }
}

// int32 [n, width] x scale [n] (x columns [width] if given) -> float32 [n, width].
void rescale(const int32_t *x, const float *columns, const float *scale, float *out, int64_t n, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const int32_t *row = x + i * width;
        float *to = out + i * width, own = scale[i];
        if (columns) {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) to[j] = (float)row[j] * columns[j] * own;
        } else {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) to[j] = (float)row[j] * own;
        }
    }
}

// y = x / rms(x) x weight, row by row; `inverse` [n] is 1 / rms(x).
void rms_norm(const float *x, const float *weight, float epsilon, float *y, float *inverse, int64_t n, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float *row = x + i * width;
        float *to = y + i * width, squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < width; j++) squares += row[j] * row[j];
        float own = 1.0f / __builtin_sqrtf(squares / (float)width + epsilon);
        inverse[i] = own;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) to[j] = weight[j] * (row[j] * own);
    }
}

void rms_norm_backward(
    const float *dy, const float *x, const float *weight, const float *inverse, float *dx, int64_t n, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float *grad = dy + i * width, *row = x + i * width;
        float *to = dx + i * width, own = inverse[i], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < width; j++) dot += grad[j] * weight[j] * row[j];
        float along = dot * own * own / (float)width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) to[j] = own * (grad[j] * weight[j] - row[j] * along);
    }
}

// Gated layers: y = activation(gate) x up, entry by entry. The activations of one row, and their gradients:
static inline void silu_row(const float *restrict g, const float *restrict u, float *restrict y, int64_t width) {
#pragma omp simd
    for (int64_t j = 0; j < width; j++) y[j] = g[j] / (1.0f + exponential(-g[j])) * u[j];
}

static inline void silu_row_backward(
    const float *restrict dy, const float *restrict g, const float *restrict u, float *restrict dg, float *restrict du,
    int64_t width) {
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        float sigmoid = 1.0f / (1.0f + exponential(-g[j]));
        du[j] = dy[j] * g[j] * sigmoid;
        dg[j] = dy[j] * u[j] * sigmoid * (1.0f + g[j] * (1.0f - sigmoid));
    }
}

// gelu's tanh form is g x sigmoid(z), z = 2 sqrt(2 / pi) (g + 0.044715 g^3).
#define GELU_OUTER 1.5957691216057308f
#define GELU_CUBE 0.044715f

static inline void gelu_tanh_row(const float *restrict g, const float *restrict u, float *restrict y, int64_t width) {
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        float z = GELU_OUTER * (g[j] + GELU_CUBE * g[j] * g[j] * g[j]);
        y[j] = g[j] / (1.0f + exponential(-z)) * u[j];
    }
}

static inline void gelu_tanh_row_backward(
    const float *restrict dy, const float *restrict g, const float *restrict u, float *restrict dg, float *restrict du,
    int64_t width) {
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        float square = GELU_CUBE * g[j] * g[j];
        float sigmoid = 1.0f / (1.0f + exponential(-GELU_OUTER * (g[j] + square * g[j])));
        float slope = GELU_OUTER * (1.0f + 3.0f * square);
        du[j] = dy[j] * g[j] * sigmoid;
        dg[j] = dy[j] * u[j] * sigmoid * (1.0f + g[j] * slope * (1.0f - sigmoid));
    }
}

// Of n rows, as floats, or as int8 (`_quantized`: y, or the gradients times the scales of the columns of gate and up).
#define GATED_PRODUCT(name)                                                                                            \
    void name##_product(const float *gate, const float *up, float *y, int64_t n, int64_t width) {                     \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++)                                  \
            name##_row(gate + i * width, up + i * width, y + i * width, width);                                       \
    }                                                                                                                  \
    void name##_product_backward(                                                                                      \
        const float *dy, const float *gate, const float *up, float *dgate, float *dup, int64_t n, int64_t width) {    \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++)                                  \
            name##_row_backward(                                                                                       \
                dy + i * width, gate + i * width, up + i * width, dgate + i * width, dup + i * width, width);         \
    }                                                                                                                  \
    void name##_product_quantized(                                                                                     \
        const float *gate, const float *up, int8_t *out, float *scale, int64_t n, int64_t width) {                    \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++) {                                \
            float y[width];                                                                                            \
            name##_row(gate + i * width, up + i * width, y, width);                                                   \
            scale[i] = quantize_row(y, NULL, out + i * width, width);                                                 \
        }                                                                                                              \
    }                                                                                                                  \
    void name##_product_fine(                                                                                          \
        const float *gate, const float *up, int16_t *out, float *scale, float levels, int64_t n, int64_t width,       \
        int64_t deep) {                                                                                                \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++) {                                \
            float y[width];                                                                                            \
            name##_row(gate + i * width, up + i * width, y, width);                                                   \
            scale[i] = quantize_fine_row(y, out + i * deep, width, deep, levels);                                     \
        }                                                                                                              \
    }                                                                                                                  \
    void name##_product_backward_quantized(                                                                            \
        const float *dy, const float *gate, const float *up, const float *gate_columns, const float *up_columns,      \
        int8_t *dgate, float *dgate_scale, int8_t *dup, float *dup_scale, int64_t n, int64_t width) {                 \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++) {                                \
            float dg[width], du[width];                                                                                \
            name##_row_backward(dy + i * width, gate + i * width, up + i * width, dg, du, width);                     \
            dgate_scale[i] = quantize_row(dg, gate_columns, dgate + i * width, width);                                \
            dup_scale[i] = quantize_row(du, up_columns, dup + i * width, width);                                      \
        }                                                                                                              \
    }

GATED_PRODUCT(silu)
GATED_PRODUCT(gelu_tanh)
