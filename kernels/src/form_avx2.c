/* The form for x86-64 with AVX2, FMA, BMI2 and F16C (Haswell, Zen and later). */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "internal.h"

#define FORM avx2
#define VL 8

typedef __m256 vf;
typedef __m256i vi;
typedef struct {
    __m256 low, high;
} vtable;

static inline vf v_set(float a) { return _mm256_set1_ps(a); }
static inline vf v_zero(void) { return _mm256_setzero_ps(); }
static inline vf v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline float v_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline vi vi_set(uint32_t a) { return _mm256_set1_epi32((int)a); }
static inline vi vi_shr(vi a, vi b) { return _mm256_srlv_epi32(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi v_words(const uint8_t *p, int stride) {
    if (stride == 4) return _mm256_loadu_si256((const __m256i *)p);
    const __m256i three = _mm256_setr_epi8(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, /* */
                                           0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
    const __m256i two = _mm256_setr_epi8(0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9, /* */
                                         0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9);
    __m256i both = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    both = _mm256_inserti128_si256(both, _mm_loadu_si128((const __m128i *)(p + 4 * stride)), 1);
    return _mm256_shuffle_epi8(both, stride == 3 ? three : two);
}
#define HAS_COMPUTED
static inline vf v_computed(vi symbols) {
    const __m256i hash = _mm256_mullo_epi32(symbols, _mm256_set1_epi32((int)TQ_MULTIPLIER));
    const __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(hash, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(TQ_MIDDLE)));
}
#define HAS_PAIRS
static inline void v_pairs(const uint16_t *pairs, const uint8_t *codes, int bits, uint32_t mask, vf *level) {
    uint64_t w;
    int p[8];
    memcpy(&w, codes, 8);
#define PAIR(k) memcpy(p + k, pairs + 2 * (w >> 2 * (k) * bits & mask), 4)
    PAIR(0), PAIR(1), PAIR(2), PAIR(3), PAIR(4), PAIR(5), PAIR(6), PAIR(7);
#undef PAIR
    level[0] = _mm256_cvtph_ps(_mm_setr_epi32(p[0], p[1], p[2], p[3]));
    level[1] = _mm256_cvtph_ps(_mm_setr_epi32(p[4], p[5], p[6], p[7]));
}
static inline vf v_lookup(const float *p, const uint8_t *codes, int64_t at, int bits, uint32_t mask) {
    uint64_t w;
    memcpy(&w, codes + (at >> 3), 8); /* 8 symbols begin at a byte */
#define LEVEL(k) p[w >> (k) * bits & mask]
    return _mm256_setr_ps(LEVEL(0), LEVEL(1), LEVEL(2), LEVEL(3), LEVEL(4), LEVEL(5), LEVEL(6), LEVEL(7));
#undef LEVEL
}
static inline vtable vtable_load(const float *p) { return (vtable){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline vf v_lookup8(vtable t, vi index) { return _mm256_permutevar8x32_ps(t.low, index); }
static inline vf v_lookup16(vtable t, vi index) {
    vf high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); /* the sign is bit 3 */
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), high);
}

static inline void v_choose(vf other, vi j, vf *best, vi *branch) {
    const __m256 less = _mm256_cmp_ps(other, *best, _CMP_LT_OQ);
    *branch = _mm256_blendv_epi8(*branch, j, _mm256_castps_si256(less));
    *best = _mm256_min_ps(other, *best);
}
static inline void v_store_bytes(uint8_t *p, vi a) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}

#include "search.h"
#include "kernels.h"
#endif
