// Products of int8 rows with a frozen int8 matrix, rescaled to floats while the sums are still in the cache.
//
// The matrix is put into panels of PANEL columns, in which the four entries that one instruction multiplies and sums
// lie side by side. This happens in every call: under ZeRO-3 the matrix comes and goes, and it costs a twentieth of the
// product. A panel stays in the cache while blocks of rows walk along it. Sums are whole numbers, so each way gives the
// same bits.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_VNNI 1
#include <immintrin.h>
#endif
#if defined(HAS_VNNI) && defined(__AMX_INT8__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { VNNI = 1, AMX = 2 };  // the ways; each is a bit of what `int8_ways` returns

#ifndef HAS_VNNI

int int8_ways(void) { return 0; }

void int8_product(
    const int8_t *x, const float *row_scale, const int8_t *weight, const float *columns, float *out, int64_t n,
    int64_t inner, int64_t outer, int transposed, int way) {
    abort();
}

#else

#define PANEL 32         // columns
#define DEEP 64          // entries along the sum that come together
#define AMX_ROWS 32
#define VNNI_ROWS 24
#define HALF 12          // rows of which the sums fill the vector registers
#define GROUP (1 << 19)  // bytes of panels that stay in the second cache

static int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

int int8_ways(void) {
    int ways = VNNI;
#ifdef HAS_AMX
    // Linux lets a process use the tiles' registers once it has asked for them.
    const long request = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request, tile_data) == 0) ways |= AMX;
#endif
    return ways;
}

// 16 rows of 16 numbers of 32 bits, `stride` bytes apart -> its transpose, `room` bytes apart.
static void transpose16(const int8_t *from, int64_t stride, int8_t *to, int64_t room) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Now r[4 a + b] holds, in each quarter q, the entries 4 a to 4 a + 3 of column 4 q + b.
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
        __m512i low = _mm512_shuffle_i32x4(r[b], r[4 + b], 0x44), high = _mm512_shuffle_i32x4(r[b], r[4 + b], 0xee);
        __m512i low2 = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0x44);
        __m512i high2 = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0xee);
        _mm512_storeu_si512(to + b * room, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(to + (4 + b) * room, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(to + (8 + b) * room, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(to + (12 + b) * room, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

// 4 rows of 16 bytes -> 16 columns of 4 bytes.
static void interleave4(const int8_t *from, int64_t stride, int8_t *to) {
    __m128i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) r[i] = _mm_loadu_si128((const __m128i *)(from + i * stride));
    __m128i low = _mm_unpacklo_epi8(r[0], r[1]), high = _mm_unpackhi_epi8(r[0], r[1]);
    __m128i low2 = _mm_unpacklo_epi8(r[2], r[3]), high2 = _mm_unpackhi_epi8(r[2], r[3]);
    _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi16(low, low2));
    _mm_storeu_si128((__m128i *)to + 1, _mm_unpackhi_epi16(low, low2));
    _mm_storeu_si128((__m128i *)to + 2, _mm_unpacklo_epi16(high, high2));
    _mm_storeu_si128((__m128i *)to + 3, _mm_unpackhi_epi16(high, high2));
}

// Columns [first, first + PANEL) of the matrix -> to [deep / 4, PANEL, 4], zeros beyond its sides. `across`: the matrix
// is [inner, outer], else it is [outer, inner]. `raised`: each entry becomes 128 more, without a sign.
static void pack_panel(
    const int8_t *weight, int8_t *to, int64_t first, int64_t inner, int64_t outer, int across, int raised) {
    int64_t deep = rounded_up(inner, DEEP), wide = outer - first < PANEL ? outer - first : PANEL;
    int64_t whole = wide == PANEL ? inner / DEEP * DEEP : 0;
    for (int64_t k = 0; k < whole; k += across ? 4 : DEEP) {
        int8_t *place = to + k * PANEL;
        if (across)
            for (int c = 0; c < PANEL; c += 16) interleave4(weight + k * outer + first + c, outer, place + 4 * c);
        else
            for (int c = 0; c < PANEL; c += 16)
                transpose16(weight + (first + c) * inner + k, inner, place + 4 * c, 4 * PANEL);
    }
    if (whole < deep) memset(to + whole * PANEL, 0, (size_t)((deep - whole) * PANEL));
    for (int64_t k = whole; k < inner; k++)
        for (int64_t c = 0; c < wide; c++)
            to[k / 4 * 4 * PANEL + 4 * c + k % 4] =
                across ? weight[k * outer + first + c] : weight[(first + c) * inner + k];
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    for (int8_t *place = to; raised && place < to + deep * PANEL; place += 64)
        _mm512_storeu_si512(place, _mm512_xor_si512(_mm512_loadu_si512(place), sign));
}

// Rows of x -> to [deep / DEEP, rows, DEEP], zeros beyond x's sides.
static void pack_rows(const int8_t *x, int8_t *to, int64_t count, int64_t rows, int64_t inner) {
    for (int64_t k = 0; k < inner; k += DEEP) {
        int64_t left = inner - k < DEEP ? inner - k : DEEP;
        int8_t *place = to + k * rows;
        if (count < rows || left < DEEP) memset(place, 0, (size_t)(rows * DEEP));
        if (left == DEEP)
            for (int64_t r = 0; r < count; r++)
                _mm512_storeu_si512(place + r * DEEP, _mm512_loadu_si512(x + r * inner + k));
        else
            for (int64_t r = 0; r < count; r++) memcpy(place + r * DEEP, x + r * inner + k, (size_t)left);
    }
}

// sums [VNNI_ROWS, PANEL] of packed rows and a raised panel.
static void vnni_block(const int8_t *rows, const int8_t *panel, int64_t deep, int32_t *sums) {
    // The instruction takes one factor without a sign: 128 more than the weight, which 128 x the row's sum takes off.
    const __m512i ones = _mm512_set1_epi8(1);
    for (int first = 0; first < VNNI_ROWS; first += HALF) {
        __m512i left[HALF], right[HALF];
#pragma GCC unroll 12
        for (int r = 0; r < HALF; r++) {
            __m512i total = _mm512_setzero_si512();
            for (int64_t k = 0; k < deep; k += DEEP)
                total = _mm512_dpbusd_epi32(
                    total, ones, _mm512_loadu_si512(rows + k * VNNI_ROWS + (first + r) * DEEP));
            left[r] = right[r] = _mm512_set1_epi32(-128 * _mm512_reduce_add_epi32(total));
        }
        for (int64_t k = 0; k < deep; k += DEEP)
            for (int i = 0; i < DEEP; i += 4) {
                const int8_t *b = panel + (k + i) * PANEL, *a = rows + k * VNNI_ROWS + first * DEEP + i;
                __m512i b0 = _mm512_loadu_si512(b);
                __m512i b1 = _mm512_loadu_si512(b + 64);
#pragma GCC unroll 12
                for (int r = 0; r < HALF; r++) {
                    int32_t four;
                    memcpy(&four, a + r * DEEP, 4);
                    __m512i y = _mm512_set1_epi32(four);
                    left[r] = _mm512_dpbusd_epi32(left[r], b0, y);
                    right[r] = _mm512_dpbusd_epi32(right[r], b1, y);
                }
            }
#pragma GCC unroll 12
        for (int r = 0; r < HALF; r++) {
            _mm512_storeu_si512(sums + (first + r) * PANEL, left[r]);
            _mm512_storeu_si512(sums + (first + r) * PANEL + 16, right[r]);
        }
    }
}

#ifdef HAS_AMX
typedef struct {
    uint8_t palette, start_row, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) Tiles;

// sums [AMX_ROWS, PANEL] of packed rows and a panel: two by two tiles of 16 by 16 sums.
static void amx_block(const int8_t *rows, const int8_t *panel, int64_t deep, int32_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < deep; k += DEEP) {
        const int8_t *a = rows + k * AMX_ROWS, *b = panel + k * PANEL;
        _tile_loadd(4, a, DEEP);
        _tile_loadd(6, b, 4 * PANEL);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, b + 64, 4 * PANEL);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, a + 16 * DEEP, DEEP);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, 4 * PANEL);
    _tile_stored(1, sums + 16, 4 * PANEL);
    _tile_stored(2, sums + 16 * PANEL, 4 * PANEL);
    _tile_stored(3, sums + 16 * PANEL + 16, 4 * PANEL);
}
#endif

static void rescale_block(
    const int32_t *sums, const float *row_scale, const float *columns, float *out, int64_t count, int64_t wide,
    int64_t outer) {
    for (int64_t r = 0; r < count; r++) {
        const int32_t *from = sums + r * PANEL;
        float *to = out + r * outer, own = row_scale[r];
        if (wide == PANEL && columns)
            for (int j = 0; j < PANEL; j++) to[j] = (float)from[j] * columns[j] * own;
        else if (wide == PANEL)
            for (int j = 0; j < PANEL; j++) to[j] = (float)from[j] * own;
        else
            for (int64_t j = 0; j < wide; j++) to[j] = (float)from[j] * (columns ? columns[j] : 1.0f) * own;
    }
}

// x [n, inner] times a matrix, int8, rescaled by row and, if given, by column -> out [n, outer]. The matrix is
// [outer, inner], or with `across` [inner, outer]. `way` is one bit of what `int8_ways` returned.
void int8_product(
    const int8_t *x, const float *row_scale, const int8_t *weight, const float *columns, float *out, int64_t n,
    int64_t inner, int64_t outer, int across, int way) {
    int64_t rows = way == AMX ? AMX_ROWS : VNNI_ROWS, deep = rounded_up(inner, DEEP), panel = deep * PANEL;
    int64_t panels = rounded_up(outer, PANEL) / PANEL, group = GROUP / panel > 0 ? GROUP / panel : 1;
    if (group > panels) group = panels;
    int8_t *packed = aligned_alloc(64, (size_t)(group * panel));
    if (!packed) abort();
#pragma omp parallel
    {
        int8_t *block = aligned_alloc(64, (size_t)(rows * deep));
        int32_t sums[AMX_ROWS * PANEL] __attribute__((aligned(64)));
        if (!block) abort();
#ifdef HAS_AMX
        Tiles before, tiles = {.palette = 1};
        for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
        if (way == AMX) _tile_storeconfig(&before), _tile_loadconfig(&tiles);
#endif
        for (int64_t from = 0; from < panels; from += group) {
            int64_t to = from + group < panels ? from + group : panels;
#pragma omp for schedule(static)
            for (int64_t p = from; p < to; p++)
                pack_panel(weight, packed + (p - from) * panel, p * PANEL, inner, outer, across, way == VNNI);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n; i += rows) {
                int64_t count = n - i < rows ? n - i : rows;
                pack_rows(x + i * inner, block, count, rows, inner);
                for (int64_t p = from; p < to; p++) {
                    int64_t j = p * PANEL, wide = outer - j < PANEL ? outer - j : PANEL;
#ifdef HAS_AMX
                    if (way == AMX)
                        amx_block(block, packed + (p - from) * panel, deep, sums);
                    else
#endif
                        vnni_block(block, packed + (p - from) * panel, deep, sums);
                    rescale_block(
                        sums, row_scale + i, columns ? columns + j : NULL, out + i * outer + j, count, wide, outer);
                }
            }
        }
#ifdef HAS_AMX
        // Other libraries may have tiles of their own, and do not set them before each use.
        if (way == AMX) _tile_loadconfig(&before);
#endif
        free(block);
    }
    free(packed);
}

#endif
