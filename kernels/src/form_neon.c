/* The form for 64-bit ARM: NEON, which every such processor for general use has. */
#if defined(__aarch64__)
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "internal.h"

#define FORM neon
#define VL 4

typedef float32x4_t vf;
typedef uint32x4_t vi;
typedef uint8x16x4_t vtable; /* 16 floats as 64 bytes */

static inline vf v_set(float a) { return vdupq_n_f32(a); }
static inline vf v_zero(void) { return vdupq_n_f32(0); }
static inline vf v_load(const float *p) { return vld1q_f32(p); }
static inline void v_store(float *p, vf a) { vst1q_f32(p, a); }
static inline vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline float v_sum(vf a) { return vaddvq_f32(a); }
static inline vi vi_set(uint32_t a) { return vdupq_n_u32(a); }
static inline vi vi_shr(vi a, vi b) { return vshlq_u32(a, vnegq_s32(vreinterpretq_s32_u32(b))); }
static inline vi vi_and(vi a, vi b) { return vandq_u32(a, b); }
static inline vi v_words(const uint8_t *p, int stride) {
    static const uint8_t spread[3][16] = {{0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9},
                                          {0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12},
                                          {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
    return vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(spread[stride - 2])));
}
#define HAS_COMPUTED
static inline vf v_computed(vi symbols) {
    const uint8x16_t hash = vreinterpretq_u8_u32(vmulq_u32(symbols, vdupq_n_u32(TQ_MULTIPLIER)));
    const int32x4_t sum = vreinterpretq_s32_u32(vpaddlq_u16(vpaddlq_u8(hash)));
    return vcvtq_f32_s32(vsubq_s32(sum, vdupq_n_s32(TQ_MIDDLE)));
}
#define HAS_PAIRS
static inline void v_pairs(const uint16_t *pairs, const uint8_t *codes, int bits, uint32_t mask, vf *level) {
    uint64_t w;
    uint16_t halves[16];
    memcpy(&w, codes, 8);
    for (int k = 0; k < 8; k++) memcpy(halves + 2 * k, pairs + 2 * (w >> 2 * k * bits & mask), 4);
    for (int k = 0; k < 4; k++) level[k] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + 4 * k)));
}
static inline vf v_lookup(const float *p, const uint8_t *codes, int64_t at, int bits, uint32_t mask) {
    uint64_t w;
    memcpy(&w, codes + (at >> 3), 8);
    w >>= at & 7;
    vf r = vdupq_n_f32(p[w & mask]);
    r = vld1q_lane_f32(p + ((w >> bits) & mask), r, 1);
    r = vld1q_lane_f32(p + ((w >> 2 * bits) & mask), r, 2);
    return vld1q_lane_f32(p + ((w >> 3 * bits) & mask), r, 3);
}
static inline vtable vtable_load(const float *p) {
    const uint8_t *bytes = (const uint8_t *)p;
    return (vtable){{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
}
static inline vf v_lookup16(vtable t, vi index) { /* level i is bytes 4 i to 4 i + 3 */
    vi bytes = vmlaq_u32(vdupq_n_u32(0x03020100), vandq_u32(index, vdupq_n_u32(15)), vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(t, vreinterpretq_u8_u32(bytes)));
}
static inline vf v_lookup8(vtable t, vi index) { return v_lookup16(t, index); }

static inline void v_choose(vf other, vi j, vf *best, vi *branch) {
    const uint32x4_t less = vcltq_f32(other, *best);
    *branch = vbslq_u32(less, j, *branch);
    *best = vbslq_f32(less, other, *best);
}
static inline void v_store_bytes(uint8_t *p, vi a) {
    const uint16x4_t words = vmovn_u32(a);
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
    memcpy(p, &four, 4);
}

#include "search.h"
#include "kernels.h"
#endif
