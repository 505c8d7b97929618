// Stored weights -> int8, row by row, to the last bit as bitsandbytes does it (int8_vectorwise_quant): the factor is
// 1 / largest, rounded, times 127; halves go to the even number; a row of zeros stays zeros.
#include "vectors.h"

static inline float of_bfloat16(uint16_t x) {
    union {
        uint32_t bits;
        float value;
    } wide = {.bits = (uint32_t)x << 16};
    return wide.value;
}

static inline float of_float32(float x) { return x; }

// x [n, width] -> int8 [n, width] and the largest entry of each row, by size, [n].
#define QUANTIZE_WEIGHTS(name, type, value_of)                                                       \
    void name(const type *x, int8_t *out, float *largest, int64_t n, int64_t width) {                \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++) {               \
            const type *row = x + i * width;                                                         \
            int8_t *to = out + i * width;                                                            \
            float most = 0.0f, spoiled = 0.0f;                                                       \
            _Pragma("omp simd reduction(max : most) reduction(+ : spoiled)") for (int64_t j = 0; j < width; j++) { \
                float value = value_of(row[j]), size = __builtin_fabsf(value);                       \
                most = size > most ? size : most;                                                    \
                spoiled += value * 0.0f;                                                             \
            }                                                                                        \
            largest[i] = most + spoiled;                                                             \
            float factor = most > 0.0f ? 1.0f / most * 127.0f : 0.0f;                                \
            _Pragma("omp simd") for (int64_t j = 0; j < width; j++)                                  \
                /* not by adding a large number: fused with the product, that would round once less */ \
                to[j] = (int8_t)(int32_t)__builtin_rintf(value_of(row[j]) * factor);                 \
        }                                                                                            \
    }

QUANTIZE_WEIGHTS(quantize_bfloat16_weights, uint16_t, of_bfloat16)
QUANTIZE_WEIGHTS(quantize_float32_weights, float, of_float32)
