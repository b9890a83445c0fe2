/* The form for x86-64 with AVX-512 F, BW, DQ, VL and VBMI (Ice Lake, Zen 4 and later). */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define FORM avx512
#define VL 16

typedef __m512 vf;
typedef __m512i vi;
typedef __m512 vtable;

static inline vf v_set(float a) { return _mm512_set1_ps(a); }
static inline vf v_zero(void) { return _mm512_setzero_ps(); }
static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline float v_sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline vi vi_set(uint32_t a) { return _mm512_set1_epi32((int)a); }
static inline vi vi_shr(vi a, vi b) { return _mm512_srlv_epi32(a, b); }
static inline vi v_words4(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline vi v_words3(const uint8_t *p) { /* 12 bytes to each quarter, and 4 of those to each lane */
    const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
    const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12));
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, _mm512_loadu_si512(p)), spread);
}
static inline __m256 v_lookup_half(const float *p, const uint8_t *codes, int64_t at, int bits, uint32_t mask) {
    uint64_t w;
    memcpy(&w, codes + (at >> 3), 8); /* 8 symbols begin at a byte */
#define LEVEL(k) p[w >> (k) * bits & mask]
    return _mm256_setr_ps(LEVEL(0), LEVEL(1), LEVEL(2), LEVEL(3), LEVEL(4), LEVEL(5), LEVEL(6), LEVEL(7));
#undef LEVEL
}
static inline vf v_lookup(const float *p, const uint8_t *codes, int64_t at, int bits, uint32_t mask) {
    __m512 low = _mm512_castps256_ps512(v_lookup_half(p, codes, at, bits, mask));
    return _mm512_insertf32x8(low, v_lookup_half(p, codes, at + 8 * bits, bits, mask), 1);
}
static inline vtable vtable_load(const float *p) { return _mm512_loadu_ps(p); }
static inline vf v_lookup16(vtable t, vi index) { return _mm512_permutexvar_ps(index, t); }
static inline vf v_lookup8(vtable t, vi index) { return _mm512_permutexvar_ps(index, t); }

/* Levels as four tables of bytes, the lowest bytes first; 256 of each, which repeat where symbols have 7 bits or less.
 */
#define HAS_BYTES
typedef struct {
    __m512i part[4][4], index, shifts;
} vbytes;

static inline void v_bytes_load(const float *levels, int bits, vbytes *table) {
    uint8_t bytes[4][256];
    for (int i = 0; i < 256; i++)
        for (int k = 0; k < 4; k++) bytes[k][i] = ((const uint8_t *)&levels[i & ((1 << bits) - 1)])[k];
    for (int k = 0; k < 4; k++)
        for (int j = 0; j < 4; j++) table->part[k][j] = _mm512_loadu_si512(bytes[k] + 64 * j);
    uint8_t index[64], shifts[64];
    for (int i = 0; i < 64; i++) {
        index[i] = (uint8_t)(i / 8 * bits + i % 8); /* 8 symbols are `bits` bytes, and go to 8 */
        shifts[i] = (uint8_t)(i % 8 * bits);
    }
    table->index = _mm512_loadu_si512(index);
    table->shifts = _mm512_loadu_si512(shifts);
}

/* 64 symbols of 5 to 8 bits as bytes; bits above them are whatever follows. */
static inline __m512i v_bytes_unpack(const vbytes *table, const uint8_t *p, int bits) {
    const __m512i data = _mm512_loadu_si512(p);
    return bits == 8 ? data : _mm512_multishift_epi64_epi8(table->shifts, _mm512_permutexvar_epi8(table->index, data));
}

/* level[q], quarter j, lane e of it: the level of symbol 16 j + 4 q + e. */
static inline void v_bytes_lookup(const vbytes *table, __m512i symbols, int bits, vf *level) {
    const __mmask64 high = bits == 8 ? _mm512_movepi8_mask(symbols) : 0;
    __m512i plane[4];
    for (int k = 0; k < 4; k++) {
        plane[k] = _mm512_permutex2var_epi8(table->part[k][0], symbols, table->part[k][1]);
        if (bits == 8)
            plane[k] = _mm512_mask_mov_epi8(plane[k], high,
                                            _mm512_permutex2var_epi8(table->part[k][2], symbols, table->part[k][3]));
    }
    const __m512i a = _mm512_unpacklo_epi8(plane[0], plane[1]), b = _mm512_unpackhi_epi8(plane[0], plane[1]);
    const __m512i c = _mm512_unpacklo_epi8(plane[2], plane[3]), d = _mm512_unpackhi_epi8(plane[2], plane[3]);
    level[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, c));
    level[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, c));
    level[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(b, d));
    level[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(b, d));
}

#include "kernels.h"
#endif
