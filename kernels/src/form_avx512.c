/* The form for x86-64 with AVX-512 F, BW, DQ, VL, VBMI and VNNI (Ice Lake, Zen 4 and later). */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "internal.h"

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
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi v_words(const uint8_t *p, int stride) {
    const __m512i bytes = _mm512_loadu_si512(p),
                  lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (stride == 4) return bytes;
    const __m512i first = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride * 0x01010101)); /* a constant */
    return _mm512_permutexvar_epi8(_mm512_add_epi8(first, _mm512_set1_epi32(0x03020100)), bytes);
}
#define HAS_COMPUTED
static inline vf v_computed(vi symbols) {
    const __m512i hash = _mm512_mullo_epi32(symbols, _mm512_set1_epi32((int)TQ_MULTIPLIER));
    const __m512i ones = _mm512_set1_epi8(1);
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_set1_epi32(-TQ_MIDDLE), hash, ones));
}

/* Eight loads, each to its lane: faster here than inserts, and than gather instructions. */
#define LOADS(TYPE, ONE, MASKED, FIRST, POINTER) \
    TYPE r = FIRST(ONE(POINTER(0)));             \
    r = MASKED(r, 2, ONE(POINTER(1)));           \
    r = MASKED(r, 4, ONE(POINTER(2)));           \
    r = MASKED(r, 8, ONE(POINTER(3)));           \
    r = MASKED(r, 16, ONE(POINTER(4)));          \
    r = MASKED(r, 32, ONE(POINTER(5)));          \
    r = MASKED(r, 64, ONE(POINTER(6)));          \
    r = MASKED(r, 128, ONE(POINTER(7)))
#define HAS_PAIRS
static inline void v_pairs(const uint16_t *pairs, const uint8_t *codes, int bits, uint32_t mask, vf *level) {
    uint64_t w;
    memcpy(&w, codes, 8);
#define PAIR(k) (pairs + 2 * (w >> 2 * (k) * bits & mask))
    LOADS(__m256i, _mm_loadu_si32, _mm256_mask_broadcastd_epi32, _mm256_castsi128_si256, PAIR);
    *level = _mm512_cvtph_ps(r);
#undef PAIR
}
static inline __m256 v_lookup_half(const float *p, const uint8_t *codes, int64_t at, int bits, uint32_t mask) {
    uint64_t w;
    memcpy(&w, codes + (at >> 3), 8); /* 8 symbols begin at a byte */
#define LEVEL(k) (p + (w >> (k) * bits & mask))
    LOADS(__m256, _mm_load_ss, _mm256_mask_broadcastss_ps, _mm256_castps128_ps256, LEVEL);
    return r;
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

static inline void v_choose(vf other, vi j, vf *best, vi *branch) {
    *branch = _mm512_mask_mov_epi32(*branch, _mm512_cmp_ps_mask(other, *best, _CMP_LT_OQ), j);
    *best = _mm512_min_ps(other, *best);
}
static inline void v_store_bytes(uint8_t *p, vi a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }

#include "search.h"
#include "kernels.h"
#endif
