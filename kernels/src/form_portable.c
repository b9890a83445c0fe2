/* The form for any processor: vectors of four are arrays, which compilers turn into what there is. */
#include <stdint.h>
#include <string.h>

#include "internal.h"

#define FORM portable
#define VL 4
#define EACH for (int i = 0; i < VL; i++)

typedef struct {
    float lane[VL];
} vf;
typedef struct {
    uint32_t lane[VL];
} vi;
typedef struct {
    float level[16];
} vtable;

static inline vf v_set(float a) {
    vf r;
    EACH r.lane[i] = a;
    return r;
}
static inline vf v_zero(void) { return v_set(0); }
static inline vf v_load(const float *p) {
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}
static inline void v_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
static inline vf v_mul(vf a, vf b) {
    EACH a.lane[i] *= b.lane[i];
    return a;
}
static inline vf v_fma(vf a, vf b, vf c) {
    EACH c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}
static inline float v_sum(vf a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }
static inline vi vi_set(uint32_t a) {
    vi r;
    EACH r.lane[i] = a;
    return r;
}
static inline vi vi_shr(vi a, vi b) {
    EACH a.lane[i] >>= b.lane[i];
    return a;
}
static inline vi vi_and(vi a, vi b) {
    EACH a.lane[i] &= b.lane[i];
    return a;
}
static inline vi v_words(const uint8_t *p, int stride) {
    vi r;
    EACH r.lane[i] = p[stride * i] | (uint32_t)p[stride * i + 1] << 8 | (uint32_t)p[stride * i + 2] << 16 |
                     (uint32_t)p[stride * i + 3] << 24;
    return r;
}
static inline vf v_lookup(const float *p, const uint8_t *codes, int64_t at, int bits, uint32_t mask) {
    vf r;
    uint64_t w;
    memcpy(&w, codes + (at >> 3), 8);
    w >>= at & 7;
    EACH r.lane[i] = p[w >> i * bits & mask];
    return r;
}
static inline vtable vtable_load(const float *p) {
    vtable t;
    memcpy(&t, p, sizeof t);
    return t;
}
static inline vf v_lookup16(vtable t, vi index) {
    vf r;
    EACH r.lane[i] = t.level[index.lane[i] & 15];
    return r;
}
static inline vf v_lookup8(vtable t, vi index) { return v_lookup16(t, index); }

static inline void v_choose(vf other, vi j, vf *best, vi *branch) {
    EACH if (other.lane[i] < best->lane[i]) {
        best->lane[i] = other.lane[i];
        branch->lane[i] = j.lane[i];
    }
}
static inline void v_store_bytes(uint8_t *p, vi a) { EACH p[i] = (uint8_t)a.lane[i]; }

#include "search.h"
#include "kernels.h"
