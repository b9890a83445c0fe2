/* What the forms share: how a stage is read by one symbol, one scale, one row. */
#ifndef TQ_INTERNAL_H
#define TQ_INTERNAL_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tqformat_kernels.h"

#define TQ_MAX_BATCH 8 /* rows of z that one call of a form's product takes */
#define TQ_ROOM 16     /* floats that a form's rotate may write behind its result */

/* Computed levels are a unit times the sum of the four bytes of symbol * TQ_MULTIPLIER mod 2^32, less TQ_MIDDLE. */
#define TQ_MULTIPLIER 0x83DCD12Du
#define TQ_MIDDLE 510

/* Scratch space that begins with a cache line, since loads that cross one are slow; free() gives it back. */
static inline void *tq_alloc(size_t size) {
#if defined(_WIN32)
    return malloc(size);
#else
    return aligned_alloc(64, (size + 63) / 64 * 64);
#endif
}

/* A form: the same functions for one set of instructions. Arguments are checked, batch is 1 to TQ_MAX_BATCH. */
typedef struct {
    const char *name;
    int (*is_fast)(const tq_stage *);
    int (*product)(const tq_stage *, const float *z, float *y, int64_t batch, int64_t row_begin, int64_t row_end);
    int (*decode)(const tq_stage *, float *out, int64_t row_begin, int64_t row_end);
    int (*row)(const tq_stage *, float *out, int64_t row);
    /* one factor of a transform: y [f, rest] -> out [rest, f], y^t h */
    void (*rotate)(const float *h, int64_t f, const float *y, int64_t rest, float *out);
    int (*search)(const tq_search *);
} tq_form;

extern const tq_form tq_form_portable, tq_form_avx2, tq_form_avx512, tq_form_neon;

static inline int64_t tq_tile_bits(const tq_stage *s) { return s->tile_rows * s->tile_cols / s->dimension * s->bits; }
static inline int64_t tq_tile_bytes(const tq_stage *s) { return (tq_tile_bits(s) + 7) / 8; }

static inline float tq_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* binary16 to binary32, exactly and without branches; what is subnormal there is 2^-24 times an integer. */
static inline float tq_from_half(uint16_t half) {
    uint32_t rest = half & 0x7fffu, few, normal = (rest << 13) + (rest < 0x7c00 ? 0x38000000u : 0x70000000u);
    float small = (float)(int32_t)rest * 0x1p-24f;
    memcpy(&few, &small, 4);
    return tq_from_bits((rest < 0x400 ? few : normal) | (uint32_t)(half & 0x8000) << 16);
}

/* binary32 to binary16, to the nearest, ties to even. */
static inline uint16_t tq_to_half(float value) {
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (bits >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);
    if (bits < 0x38800000u) { /* subnormal there: the sum's last bit is worth 2^-24 */
        value = tq_from_bits(bits) + 0.5f;
        memcpy(&bits, &value, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    return (uint16_t)(sign | (((bits + 0xfffu + (bits >> 13 & 1)) >> 13) - (112u << 10)));
}

/* binary32 to bfloat16, to the nearest, ties to even. */
static inline uint16_t tq_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(value != value ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* OCP E4M3: no infinities, 0x7f is NaN. */
static inline float tq_from_e4m3(uint8_t byte) {
    int exponent = byte >> 3 & 15, mantissa = byte & 7;
    if ((byte & 0x7f) == 0x7f) return tq_from_bits(0x7fc00000u);
    float value =
        exponent ? (float)(8 + mantissa) * tq_from_bits((uint32_t)(exponent + 117) << 23) : (float)mantissa * 0x1p-9f;
    return byte & 0x80 ? -value : value;
}

static inline float tq_from_e8m0(uint8_t byte) {
    return tq_from_bits(byte == 255 ? 0x7fc00000u : byte ? (uint32_t)byte << 23 : 0x00400000u);
}

static inline float tq_element(const void *data, int32_t dtype, int64_t i) {
    const uint8_t *bytes = (const uint8_t *)data;
    float value;
    uint16_t half;
    switch (dtype) {
        case TQ_F16: memcpy(&half, bytes + 2 * i, 2); return tq_from_half(half);
        case TQ_BF16: memcpy(&half, bytes + 2 * i, 2); return tq_from_bits((uint32_t)half << 16);
        case TQ_U8: return bytes[i];
        case TQ_I8: return (int8_t)bytes[i];
        case TQ_F8_E4M3: return tq_from_e4m3(bytes[i]);
        case TQ_F8_E8M0: return tq_from_e8m0(bytes[i]);
        default: memcpy(&value, bytes + 4 * i, 4); return value;
    }
}

/* Scale or offset of vector v of row r, of n vectors a row. */
static inline float tq_factor(const tq_factors *f, int64_t n, int64_t r, int64_t v) {
    float value = tq_element(f->data, f->dtype, r * n + v);
    if (f->outer)
        value *=
            tq_element(f->outer, f->outer_dtype, (f->outer_rows > 1 ? r * f->outer_cols : 0) + v / (n / f->outer_cols));
    return value;
}

/* Elements `first` to first + n - 1 as floats, of TQ_F32, TQ_F16 or TQ_BF16: loops that compilers turn into vectors. */
static inline void tq_floats(const void *data, int32_t dtype, int64_t first, int64_t n, float *out) {
    const uint8_t *p = (const uint8_t *)data + (dtype == TQ_F32 ? 4 : 2) * first;
    uint16_t half;
    if (dtype == TQ_F32) memcpy(out, p, (size_t)n * 4);
    else if (dtype == TQ_F16)
        for (int64_t i = 0; i < n; i++) memcpy(&half, p + 2 * i, 2), out[i] = tq_from_half(half);
    else
        for (int64_t i = 0; i < n; i++) memcpy(&half, p + 2 * i, 2), out[i] = tq_from_bits((uint32_t)half << 16);
}

/* The scales or offsets of row r, as [n] floats. */
static inline void tq_factor_row(const tq_factors *f, int64_t n, int64_t r, float *out) {
    if (f->dtype <= TQ_BF16 && !f->outer) tq_floats(f->data, f->dtype, r * n, n, out);
    else
        for (int64_t v = 0; v < n; v++) out[v] = tq_factor(f, n, r, v);
}

/* The 32 bits from byte i of a tile; bytes beyond its end count as 0. */
static inline uint32_t tq_word(const uint8_t *tile, int64_t bytes, int64_t i) {
    uint32_t word = 0;
    if (i + 4 <= bytes) memcpy(&word, tile + i, 4);
    else if (i < bytes) memcpy(&word, tile + i, (size_t)(bytes - i));
    return word;
}

/* The symbol whose window begins at stream bit `at` of a tile [TQ-CODE-6]. */
static inline uint32_t tq_symbol(const uint8_t *tile, int64_t tile_bits, int64_t at, int window) {
    int64_t bytes = (tile_bits + 7) / 8, left = tile_bits - at;
    uint32_t symbol = tq_word(tile, bytes, at >> 3) >> (at & 7);
    if (left < window) symbol = (symbol & ((1u << left) - 1)) | tq_word(tile, bytes, 0) << left;
    return symbol & ((1u << window) - 1);
}

#endif
