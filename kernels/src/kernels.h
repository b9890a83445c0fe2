/* The kernels, written once over a few vector operations that each form defines before it includes this file:
 *
 *   FORM, VL                     name of the form; 32-bit lanes of a vector
 *   vf, vi                       VL floats; VL unsigned 32-bit integers
 *   v_zero, v_set, v_load, v_store, v_mul, v_fma(a, b, c) = a * b + c, v_sum
 *   vi_set, vi_and, vi_shr       shift right by the lanes of a vector that vi_set made
 *   v_words4(p), v_words3(p)     lane i: the 4 bytes from p + 4 i, or from p + 3 i
 *   v_gather(p, i)               lane: p[i]
 *   vtable, vtable_load(p), v_lookup8(t, i), v_lookup16(t, i)    16 floats; the low 3 or 4 bits of a lane choose one
 *   HAS_BYTES, v_bytes...        (optional) 8-bit symbols by tables of bytes; see rows_product
 *
 * Three ways lead to a product. `rows`: codes that run along a row, scalar, plain; lanes are groups of neighbouring
 * columns, and z is brought into their order once. `columns`: codes that run down a column, scalar, plain or trellis;
 * lanes are groups of neighbouring rows, z is broadcast, sums stay in registers. `general`: everything else; a row is
 * decoded into a buffer and multiplied. Bits are taken in words of `per` symbols, `stride` bytes apart.
 */
#include "internal.h"

#define INLINE static inline __attribute__((always_inline))
#define CHUNK 64 /* columns whose tiles `columns` brings into the first-level cache at a time */
#define PAD 64 /* bytes that a vector load may pass the last symbol by */

typedef enum { LOOKUP8, LOOKUP16, GATHER, BYTES } lookup;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

/* Bytes from word to word; 0 where this many bits have no words. */
static int word_stride(int bits) { return bits == 1 || bits == 2 || bits == 4 || bits == 8 ? 4 : bits == 3 || bits == 6 ? 3 : 0; }

INLINE vi load_words(const uint8_t *p, int stride) { return stride == 4 ? v_words4(p) : v_words3(p); }

/* One level for each lane, of its low `bits` bits. The tables of LOOKUP8 and LOOKUP16 repeat, so they need no mask. */
INLINE vf look_up(lookup how, vtable table, const float *levels, vi symbols, vi mask) {
    if (how == LOOKUP8) return v_lookup8(table, symbols);
    if (how == LOOKUP16) return v_lookup16(table, symbols);
    return v_gather(levels, vi_and(symbols, mask));
}

static lookup choose_lookup(const tq_stage *s) {
    return s->window != s->bits || s->bits > 4 ? GATHER : s->bits == 4 ? LOOKUP16 : LOOKUP8;
}

static vtable load_table(const tq_stage *s, lookup how) {
    float table[16];
    for (int i = 0; i < 16; i++) table[i] = how == GATHER ? 0 : s->levels[i & ((1 << s->bits) - 1)];
    return vtable_load(table);
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    vf sum[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int k = 0; k < 4; k++) sum[k] = v_fma(v_load(a + i + k * VL), v_load(b + i + k * VL), sum[k]);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return ((v_sum(sum[0]) + v_sum(sum[1])) + (v_sum(sum[2]) + v_sum(sum[3]))) + rest;
}

/* ---- general: any stage, row by row ---- */

/* The levels of `count` symbols of one tile from symbol `first` on, as [count, dimension]. */
INLINE void symbols_to_levels(const tq_stage *s, const uint8_t *tile, const float *book, int64_t first, int64_t count, int p,
                              float *out) {
    const int64_t tile_bits = tq_tile_bits(s);
    const int bits = s->bits, window = s->window;
    const uint32_t mask = (1u << window) - 1;
    int64_t t = 0, at = first * bits;
    for (; t < count && (at >> 3) + 4 <= tile_bits >> 3; t++, at += bits) { /* a whole word lies ahead, hence a window */
        uint32_t word;
        memcpy(&word, tile + (at >> 3), 4);
        memcpy(out + t * p, book + (int64_t)(word >> (at & 7) & mask) * p, (size_t)p * 4);
    }
    for (; t < count; t++, at += bits)
        memcpy(out + t * p, book + (int64_t)tq_symbol(tile, tile_bits, at, window) * p, (size_t)p * 4);
}

/* out[c] = scale * level + offset of row r; scale and offset are [cols / vector_length] floats of scratch. */
static void general_row(const tq_stage *s, int64_t r, float *scale, float *offset, float *out) {
    const int64_t tile_bytes = tq_tile_bytes(s), vectors = s->cols / s->vector_length;
    const int64_t across = s->cols / s->tile_cols, count = s->tile_cols / s->dimension;
    const float *book = s->levels + (s->levels_per_row ? r * s->dimension << s->window : 0);
    const uint8_t *tile = s->codes + r / s->tile_rows * across * tile_bytes;
    for (int64_t k = 0; k < across; k++, tile += tile_bytes) {
        int64_t first = r % s->tile_rows * count;
        float *to = out + k * s->tile_cols;
        switch (s->dimension) { /* constants, so that each copy is a load and a store */
        case 1: symbols_to_levels(s, tile, book, first, count, 1, to); break;
        case 2: symbols_to_levels(s, tile, book, first, count, 2, to); break;
        case 4: symbols_to_levels(s, tile, book, first, count, 4, to); break;
        case 8: symbols_to_levels(s, tile, book, first, count, 8, to); break;
        default: symbols_to_levels(s, tile, book, first, count, s->dimension, to);
        }
    }
    tq_factor_row(&s->scales, vectors, r, scale);
    if (s->offsets.data) tq_factor_row(&s->offsets, vectors, r, offset);
    for (int64_t v = 0; v < vectors; v++) {
        float *to = out + v * s->vector_length, plus = s->offsets.data ? offset[v] : 0;
        for (int64_t e = 0; e < s->vector_length; e++) to[e] = scale[v] * to[e] + plus;
    }
}

static int general_product(const tq_stage *s, const float *z, float *y, int64_t batch, int64_t begin, int64_t end) {
    float *scratch = malloc((size_t)(3 * s->cols) * sizeof(float));
    if (!scratch) return TQ_MEMORY;
    float *row = scratch + 2 * s->cols;
    for (int64_t r = begin; r < end; r++) {
        general_row(s, r, scratch, scratch + s->cols, row);
        for (int64_t b = 0; b < batch; b++) y[b * s->rows + r] = dot(row, z + b * s->cols, s->cols);
    }
    free(scratch);
    return TQ_OK;
}

static int general_rows(const tq_stage *s, float *out, int64_t begin, int64_t end) {
    float *scratch = malloc((size_t)(2 * s->cols) * sizeof(float));
    if (!scratch) return TQ_MEMORY;
    for (int64_t r = begin; r < end; r++) general_row(s, r, scratch, scratch + s->cols, out + (r - begin) * s->cols);
    free(scratch);
    return TQ_OK;
}

static int form_row(const tq_stage *s, float *out, int64_t r) { return general_rows(s, out, r, r + 1); }

/* sums[b, v] = sum of z[b] over vector v: what an offset is multiplied with. */
static void vector_sums(const tq_stage *s, const float *z, int64_t batch, float *sums) {
    for (int64_t i = 0; i < batch * (s->cols / s->vector_length); i++) {
        float sum = 0;
        for (int64_t e = 0; e < s->vector_length; e++) sum += z[i * s->vector_length + e];
        sums[i] = sum;
    }
}

/* ---- rows ---- */

/* Lane l of the k-th of `per` vectors of a block stands for this column of the block. */
INLINE int64_t column_of(lookup how, int per, int k, int l) {
    return how == BYTES ? 16 * (l / 4) + 4 * k + l % 4 : (int64_t)l * per + k;
}

static lookup choose_rows(const tq_stage *s) {
#ifdef HAS_BYTES
    if (s->bits > 4) return BYTES;
#endif
    return choose_lookup(s);
}

static int rows_fit(const tq_stage *s) {
    if (s->dimension != 1 || s->levels_per_row || s->window != s->bits || s->tile_cols != s->cols) return 0;
    if (s->tile_rows > 1 && s->cols * s->bits % 8) return 0;
    const int stride = word_stride(s->bits);
    const lookup how = choose_rows(s);
    if (how != BYTES && !stride) return 0;
    if (s->bits > 8) return 0;
    return s->vector_length == s->cols || s->vector_length % (how == BYTES ? 16 : 8 * stride / s->bits) == 0;
}

/* sums[b] += the products of `blocks` blocks of one row with NB rows of z in the order of the lanes, `step` apart. lanes
 * are the scales of each block's lanes, or NULL where one scale serves the whole row. */
INLINE void rows_dot(lookup how, int NB, const uint8_t *p, int64_t blocks, int stride, int per, int bits, vtable table,
                     const float *levels, const float *z, int64_t step, const float *lanes, vf *sums) {
    const vi shift = vi_set((uint32_t)bits), mask = vi_set((1u << bits) - 1);
    for (int64_t i = 0; i < blocks; i++, p += VL * stride, z += per * VL) {
        vf part[4][4]; /* four sums for each row of z hide the latency of the additions; one where there are many rows */
        for (int b = 0; b < NB; b++)
            for (int k = 0; k < 4; k++) part[b][k] = !k && !lanes ? sums[b] : v_zero();
        vi word = load_words(p, stride);
        for (int k = 0; k < per; k += 4)
            for (int j = 0; j < 4; j++) {
                vf level = look_up(how, table, levels, word, mask);
                word = vi_shr(word, shift);
                for (int b = 0; b < NB; b++) {
                    vf *to = &part[b][NB == 1 ? j : NB == 2 ? j & 1 : 0];
                    *to = v_fma(level, v_load(z + b * step + (k + j) * VL), *to);
                }
            }
        for (int b = 0; b < NB; b++) {
            vf sum = NB == 1   ? v_add(v_add(part[b][0], part[b][1]), v_add(part[b][2], part[b][3]))
                     : NB == 2 ? v_add(part[b][0], part[b][1])
                               : part[b][0];
            sums[b] = lanes ? v_fma(sum, v_load(lanes + i * VL), sums[b]) : sum;
        }
    }
}

#ifdef HAS_BYTES
/* The same for 5 to 8 bits: 64 symbols as bytes, and each of the four bytes of their levels from a table of its own. */
INLINE void rows_dot_bytes(int NB, const uint8_t *p, int64_t blocks, int bits, const vbytes *table, const float *z, int64_t step,
                           const float *lanes, vf *sums) {
    for (int64_t i = 0; i < blocks; i++, p += 8 * bits, z += 4 * VL) {
        vf level[4];
        v_bytes_lookup(table, v_bytes_unpack(table, p, bits), bits, level);
        for (int b = 0; b < NB; b++) {
            const float *x = z + b * step;
            vf one = v_fma(level[1], v_load(x + VL), v_mul(level[0], v_load(x)));
            vf two = v_fma(level[3], v_load(x + 3 * VL), v_mul(level[2], v_load(x + 2 * VL)));
            sums[b] = lanes ? v_fma(v_add(one, two), v_load(lanes + i * VL), sums[b]) : v_add(sums[b], v_add(one, two));
        }
    }
}
#endif

static int rows_product(const tq_stage *s, const float *z, float *y, int64_t batch, int64_t begin, int64_t end) {
    const lookup how = choose_rows(s);
    const int bits = s->bits, stride = word_stride(bits), per = how == BYTES ? 4 : 8 * stride / bits;
    const int64_t block_cols = (int64_t)per * VL, blocks = (s->cols + block_cols - 1) / block_cols, step = blocks * block_cols;
    const int64_t vectors = s->cols / s->vector_length, row_bytes = (s->cols * bits + 7) / 8;
    const int64_t block_bytes = how == BYTES ? 8 * bits : VL * stride;
    float *scratch = malloc((size_t)(batch * (step + vectors) + blocks * VL + 2 * vectors) * sizeof(float));
    uint8_t *last = malloc((size_t)(row_bytes + block_bytes + PAD));
    if (!scratch || !last) {
        free(scratch);
        free(last);
        return TQ_MEMORY;
    }
    float *lanes = scratch + batch * step, *scale = lanes + blocks * VL, *offset = scale + vectors, *sums = offset + vectors;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < blocks; i++)
            for (int k = 0; k < per; k++)
                for (int l = 0; l < VL; l++) {
                    int64_t c = i * block_cols + column_of(how, per, k, l);
                    scratch[b * step + i * block_cols + k * VL + l] = c < s->cols ? z[b * s->cols + c] : 0;
                }
    if (s->offsets.data) vector_sums(s, z, batch, sums);
    const vtable table = load_table(s, how == BYTES ? GATHER : how);
#ifdef HAS_BYTES
    vbytes bytes;
    memset(&bytes, 0, sizeof bytes);
    if (how == BYTES) v_bytes_load(s->levels, bits, &bytes);
#endif
    for (int64_t r = begin; r < end; r++) {
        const int64_t at = r / s->tile_rows * tq_tile_bytes(s) + r % s->tile_rows * row_bytes;
        const uint8_t *p = s->codes + at;
        if (at + blocks * block_bytes + PAD > s->codes_bytes) { /* loads would pass the end of all codes: read a copy */
            memset(last, 0, (size_t)(row_bytes + block_bytes + PAD));
            p = (const uint8_t *)memcpy(last, p, (size_t)row_bytes);
        }
        tq_factor_row(&s->scales, vectors, r, scale);
        const float *with = NULL;
        if (vectors > 1) {
            with = lanes;
            for (int64_t i = 0; i < blocks; i++)
                for (int l = 0; l < VL; l++) {
                    int64_t c = i * block_cols + column_of(how, per, 0, l);
                    lanes[i * VL + l] = c < s->cols ? scale[c / s->vector_length] : 0;
                }
        }
        for (int64_t b = 0; b < batch;) {
            const int64_t left = batch - b;
            const int n = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            const float *zb = scratch + b * step;
            vf sum[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
#define DOT(HOW, NB) rows_dot(HOW, NB, p, blocks, stride, per, bits, table, s->levels, zb, step, with, sum)
#define DOTS(NB)                                     \
    switch (how) {                                   \
    case LOOKUP8: DOT(LOOKUP8, NB); break;           \
    case LOOKUP16: DOT(LOOKUP16, NB); break;         \
    case GATHER: DOT(GATHER, NB); break;             \
    case BYTES: DOT_BYTES(NB); break;                \
    }
#ifdef HAS_BYTES
#define DOT_BYTES(NB) rows_dot_bytes(NB, p, blocks, bits, &bytes, zb, step, with, sum)
#else
#define DOT_BYTES(NB) (void)0
#endif
            if (n == 4) {
                DOTS(4)
            } else if (n == 2) {
                DOTS(2)
            } else {
                DOTS(1)
            }
            for (int j = 0; j < n; j++) {
                float *to = y + (b + j) * s->rows + r;
                *to = v_sum(sum[j]) * (with ? 1 : scale[0]);
            }
            b += n;
        }
        if (s->offsets.data) {
            tq_factor_row(&s->offsets, vectors, r, offset);
            for (int64_t b = 0; b < batch; b++) y[b * s->rows + r] += dot(offset, sums + b * vectors, vectors);
        }
    }
    free(scratch);
    free(last);
    return TQ_OK;
}

/* ---- columns ---- */

/* Symbols that one word gives: from a byte border, at most 7 bits on, K of them within 32 bits. */
static int symbols_per_word(const tq_stage *s, int most) {
    const int per = 8 * word_stride(s->bits) / s->bits;
    for (int k = most; k > 1; k /= 2) {
        int worst = 0;
        for (int k0 = 0; k0 < per; k0 += k) worst = k0 * s->bits % 8 > worst ? k0 * s->bits % 8 : worst;
        if (per % k == 0 && worst + (k - 1) * s->bits + s->window <= 32) return k;
    }
    return 0;
}

static int columns_fit(const tq_stage *s) {
    if (s->dimension != 1 || s->levels_per_row || s->tile_cols != 1 || !word_stride(s->bits)) return 0;
    if (s->window > s->bits && s->tile_rows * s->bits % 8) return 0; /* the wrap is done by bytes */
    return symbols_per_word(s, 2) != 0;
}

/* sums[NB][per][lanes] += level * z over n columns, for one group of VL lanes and the symbols k0 to k0 + K - 1 of each. */
INLINE void columns_add(lookup how, int K, int NB, const uint8_t *tiles, int64_t tile_step, int n, int stride, int bits,
                        int window, int k0, vtable table, const float *levels, const float *z, int64_t z_step, float *sums,
                        int64_t k_step, int64_t b_step) {
    const vi first = vi_set((uint32_t)(k0 * bits % 8)), shift = vi_set((uint32_t)bits), mask = vi_set((1u << window) - 1);
    const uint8_t *p = tiles + k0 * bits / 8;
    vf sum[4][8];
    for (int b = 0; b < NB; b++)
        for (int k = 0; k < K; k++) sum[b][k] = v_load(sums + b * b_step + (k0 + k) * k_step);
    for (int c = 0; c < n; c++, p += tile_step) {
        vi word = vi_shr(load_words(p, stride), first);
        vf x[4];
        for (int b = 0; b < NB; b++) x[b] = v_set(z[b * z_step + c]);
        for (int k = 0; k < K; k++) {
            vf level = look_up(how, table, levels, word, mask);
            word = vi_shr(word, shift);
            for (int b = 0; b < NB; b++) sum[b][k] = v_fma(level, x[b], sum[b][k]);
        }
    }
    for (int b = 0; b < NB; b++)
        for (int k = 0; k < K; k++) v_store(sums + b * b_step + (k0 + k) * k_step, sum[b][k]);
}

/* Copies n tiles to `to`, tile_step apart, each followed by its own beginning, where a trellis goes on [TQ-CODE-6]. */
static void copy_tiles(const uint8_t *from, int64_t tile_bytes, int n, uint8_t *to, int64_t tile_step) {
    for (int c = 0; c < n; c++, from += tile_bytes, to += tile_step) {
        memcpy(to, from, (size_t)tile_bytes);
        for (int i = 0; i < 4; i++) to[tile_bytes + i] = to[i % tile_bytes];
    }
}

static int columns_product(const tq_stage *s, const float *z, float *y, int64_t batch, int64_t begin, int64_t end) {
    const lookup how = choose_lookup(s);
    const int bits = s->bits, stride = word_stride(bits), per = 8 * stride / bits;
    const int64_t tile_bytes = tq_tile_bytes(s), vectors = s->cols / s->vector_length, height = s->tile_rows;
    const int64_t lanes = round_up((height + per - 1) / per, VL), b_step = lanes * per;
    const int64_t tile_step = round_up(lanes * stride + PAD, 64);
    const int widest = symbols_per_word(s, 8), wide = widest < 4 ? widest : 4;
    /* sums of the vector at hand, sums of all, sums of z by vectors, tiles */
    float *part = calloc((size_t)(2 * batch * b_step + batch * vectors) * sizeof(float) + (size_t)(CHUNK * tile_step), 1);
    if (!part) return TQ_MEMORY;
    float *total = part + batch * b_step, *sums = total + batch * b_step;
    uint8_t *tiles = (uint8_t *)(sums + batch * vectors);
    if (s->offsets.data) vector_sums(s, z, batch, sums);
    const vtable table = load_table(s, how);
    for (int64_t r = begin; r < end; r += height) {
        const uint8_t *codes = s->codes + r / height * s->cols * tile_bytes;
        memset(part, 0, (size_t)(2 * batch * b_step) * sizeof(float));
        for (int64_t v = 0; v < vectors; v++) {
            const int64_t stop = (v + 1) * s->vector_length;
            for (int64_t c = v * s->vector_length; c < stop; c += CHUNK) {
                const int n = (int)min64(CHUNK, stop - c);
                copy_tiles(codes + c * tile_bytes, tile_bytes, n, tiles, tile_step);
                for (int64_t b = 0; b < batch;) {
                    const int64_t left = batch - b;
                    const int nb = left >= 4 ? 4 : left >= 2 ? 2 : 1;
                    const int K = nb == 1 ? widest : nb == 2 ? wide : 2;
#define ADD(HOW, K, NB)                                                                                                     \
    for (int64_t g = 0; g < lanes; g += VL)                                                                                 \
        for (int k0 = 0; k0 < per; k0 += K)                                                                                 \
            columns_add(HOW, K, NB, tiles + g * stride, tile_step, n, stride, bits, s->window, k0, table, s->levels,        \
                        z + b * s->cols + c, s->cols, part + b * b_step + g, lanes, b_step);
#define ADDS(K, NB)                                                                                                         \
    if (how == LOOKUP8) {                                                                                                   \
        ADD(LOOKUP8, K, NB)                                                                                                 \
    } else if (how == LOOKUP16) {                                                                                           \
        ADD(LOOKUP16, K, NB)                                                                                                \
    } else {                                                                                                                \
        ADD(GATHER, K, NB)                                                                                                  \
    }
                    if (nb == 4) {
                        ADDS(2, 4)
                    } else if (nb == 2 && K == 4) {
                        ADDS(4, 2)
                    } else if (nb == 2) {
                        ADDS(2, 2)
                    } else if (K == 8) {
                        ADDS(8, 1)
                    } else if (K == 4) {
                        ADDS(4, 1)
                    } else {
                        ADDS(2, 1)
                    }
                    b += nb;
                }
            }
            for (int64_t i = 0; i < height; i++) {
                const float scale = tq_factor(&s->scales, vectors, r + i, v);
                const float offset = s->offsets.data ? tq_factor(&s->offsets, vectors, r + i, v) : 0;
                const int64_t at = i % per * lanes + i / per;
                for (int64_t b = 0; b < batch; b++) {
                    total[b * b_step + at] += scale * part[b * b_step + at];
                    if (s->offsets.data) total[b * b_step + at] += offset * sums[b * vectors + v];
                }
            }
            memset(part, 0, (size_t)(batch * b_step) * sizeof(float));
        }
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < height; i++) y[b * s->rows + r + i] = total[b * b_step + i % per * lanes + i / per];
    }
    free(part);
    return TQ_OK;
}

/* Whole tiles of columns, by the same words: n columns' levels lie in a buffer, and go from there to their rows. */
static int columns_decode(const tq_stage *s, float *out, int64_t begin, int64_t end) {
    enum { N = 16 }; /* columns at a time: 64 bytes of a row of the result */
    const lookup how = choose_lookup(s);
    const int bits = s->bits, stride = word_stride(bits), per = 8 * stride / bits, K = symbols_per_word(s, 8);
    const int64_t tile_bytes = tq_tile_bytes(s), vectors = s->cols / s->vector_length, height = s->tile_rows;
    const int64_t lanes = round_up((height + per - 1) / per, VL), tile_step = round_up(lanes * stride + PAD, 64);
    float *levels = malloc((size_t)(N * lanes * per + 2 * height) * sizeof(float) + (size_t)(N * tile_step));
    if (!levels) return TQ_MEMORY;
    float *scale = levels + N * lanes * per, *offset = scale + height;
    uint8_t *tiles = memset(offset + height, 0, (size_t)(N * tile_step));
    const vtable table = load_table(s, how);
    const vi shift = vi_set((uint32_t)bits), mask = vi_set((1u << s->window) - 1);
    for (int64_t tile = begin / height * height; tile < end; tile += height) {
        const int64_t r0 = tile < begin ? begin : tile, r1 = min64(tile + height, end);
        for (int64_t v = 0; v < vectors; v++) {
            for (int64_t r = r0; r < r1; r++) {
                scale[r - tile] = tq_factor(&s->scales, vectors, r, v);
                offset[r - tile] = s->offsets.data ? tq_factor(&s->offsets, vectors, r, v) : 0;
            }
            const int64_t stop = (v + 1) * s->vector_length;
            for (int64_t c = v * s->vector_length; c < stop; c += N) {
                const int n = (int)min64(N, stop - c);
                copy_tiles(s->codes + (tile / height * s->cols + c) * tile_bytes, tile_bytes, n, tiles, tile_step);
                for (int j = 0; j < n; j++)
                    for (int64_t g = 0; g < lanes; g += VL)
                        for (int k0 = 0; k0 < per; k0 += K) {
                            vi word = load_words(tiles + j * tile_step + g * stride + k0 * bits / 8, stride);
                            word = vi_shr(word, vi_set((uint32_t)(k0 * bits % 8)));
                            for (int k = k0; k < k0 + K; k++, word = vi_shr(word, shift)) {
                                vf level = how == LOOKUP8    ? look_up(LOOKUP8, table, s->levels, word, mask)
                                           : how == LOOKUP16 ? look_up(LOOKUP16, table, s->levels, word, mask)
                                                             : look_up(GATHER, table, s->levels, word, mask);
                                v_store(levels + (j * per + k) * lanes + g, level);
                            }
                        }
                for (int64_t r = r0; r < r1; r++) {
                    const int64_t i = r - tile, at = i % per * lanes + i / per;
                    float *to = out + (r - begin) * s->cols + c;
                    for (int j = 0; j < n; j++) to[j] = scale[i] * levels[j * per * lanes + at] + offset[i];
                }
            }
        }
    }
    free(levels);
    return TQ_OK;
}

/* ---- the form ---- */

static int form_is_fast(const tq_stage *s) { return rows_fit(s) || columns_fit(s); }

static int form_product(const tq_stage *s, const float *z, float *y, int64_t batch, int64_t begin, int64_t end) {
    if (columns_fit(s)) return columns_product(s, z, y, batch, begin, end);
    if (rows_fit(s)) return rows_product(s, z, y, batch, begin, end);
    return general_product(s, z, y, batch, begin, end);
}

/* A few rows of a high tile are sooner read one by one. */
static int form_decode(const tq_stage *s, float *out, int64_t begin, int64_t end) {
    if (columns_fit(s) && 4 * (end - begin) >= s->tile_rows) return columns_decode(s, out, begin, end);
    return general_rows(s, out, begin, end);
}

#define FORM_NAME_(name) tq_form_##name
#define FORM_NAME(name) FORM_NAME_(name)
#define FORM_STRING_(name) #name
#define FORM_STRING(name) FORM_STRING_(name)

const tq_form FORM_NAME(FORM) = {FORM_STRING(FORM), form_is_fast, form_product, form_decode, form_row};
