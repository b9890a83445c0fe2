/* The form for x86-64 with AVX2, FMA and BMI2 (Haswell, Zen and later). */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

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
static inline vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline float v_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline vi vi_set(uint32_t a) { return _mm256_set1_epi32((int)a); }
static inline vi vi_shr(vi a, vi b) { return _mm256_srlv_epi32(a, b); }
static inline vi v_words4(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline vi v_words3(const uint8_t *p) {
    const __m256i spread = _mm256_setr_epi8(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, /* */
                                            0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
    __m256i both = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    both = _mm256_inserti128_si256(both, _mm_loadu_si128((const __m128i *)(p + 12)), 1);
    return _mm256_shuffle_epi8(both, spread);
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

#include "kernels.h"
#endif
