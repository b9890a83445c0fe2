/* The kernels, written once over a few vector operations that each form defines before it includes this file:
 *
 *   FORM, VL                     name of the form; 32-bit lanes of a vector
 *   vf, vi                       VL floats; VL unsigned 32-bit integers
 *   v_zero, v_set, v_load, v_store, v_mul, v_fma(a, b, c) = a * b + c, v_sum
 *   vi_set, vi_shr               shift right by the lanes of a vector that vi_set made
 *   vi_and, v_words(p, stride)   lane i: the 4 bytes from p + stride * i, stride being 2, 3 or 4
 *   vtable, vtable_load(p), v_lookup8(t, i), v_lookup16(t, i)    16 floats; the low 3 or 4 bits of a lane choose one
 *   v_lookup(levels, p, at, bits, mask)    lane i: the level of the symbol at bit `at` + i * bits from p; 8 bytes per 8
 *   HAS_COMPUTED, v_computed(s)  (optional) the levels of a computed codebook in its unit, from masked symbols
 *   HAS_PAIRS, v_pairs(pairs, p, bits, mask, level)    (optional) the levels of 16 symbols from p on, as vectors, from
 * a table of pairs in binary16 HAS_BYTES, v_bytes...        (optional) 5 to 8 bits by tables of bytes; see
 * rows_dot_bytes
 *
 * Three ways lead to a product. `rows`: codes that run along a row, scalar, plain; lanes are groups of neighbouring
 * columns, and z is brought into their order once. `columns`: codes that run down a column, scalar, plain or trellis;
 * lanes are groups of neighbouring rows, z is broadcast, sums stay in registers. `general`: everything else; a row is
 * decoded into a buffer and multiplied.
 *
 * Plain symbols of 1 to 4 bits are looked up in registers, VL words at once: a word holds `per` symbols, one after the
 * other is shifted to its low end, and words are `stride` bytes apart. A trellis of computed levels is read in the same
 * way. All others are looked up in memory, one by one, or two neighbours of a trellis at once where the stage has a
 * table of pairs: on the processors at hand that is faster than their gather instructions, which the remedies for
 * Downfall slow further.
 */
#include "internal.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8") /* so that arrays of sums become registers */
#endif
#define AHEAD 8192 /* bytes from what is read to what is fetched from memory meanwhile */
#define CHUNK 16   /* columns that `columns` works on at a time; four times as many where it copies their tiles */
#define PAD 64     /* bytes that a vector load may pass the last symbol by */
#define PAIRS 16   /* symbols that v_pairs takes: they begin and end at bytes */

typedef enum {
    IN_8, /* registers that hold 8 levels, 16, or 256 as bytes */
    IN_16,
    IN_BYTES,
    COMPUTED, /* from the symbol, without a table */
    IN_PAIRS, /* a table in memory that holds two neighbours in binary16 */
    IN_MEMORY,
} lookup;

/* Fetches the cache line of p[ahead], which may lie outside the array, to the second level: the first is full of z. */
INLINE void prefetch(const uint8_t *p, int64_t ahead) {
    __builtin_prefetch((void *)((uintptr_t)p + (uintptr_t)ahead), 0, 2);
}

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

/* Bytes from word to word, for up to 4 bits. */
INLINE int word_stride(int bits) { return bits == 3 ? 3 : 4; }

/* Tables of registers repeat where symbols have fewer bits, so that what stands above a symbol needs no mask. */
INLINE vf look_up(lookup how, vtable table, vi symbols) {
    return how == IN_8 ? v_lookup8(table, symbols) : v_lookup16(table, symbols);
}

static lookup choose_lookup(const tq_stage *s) {
    return s->window != s->bits || s->bits > 4 ? IN_MEMORY : s->bits == 4 ? IN_16 : IN_8;
}

static vtable load_table(const tq_stage *s, lookup how) {
    float table[16];
    for (int i = 0; i < 16; i++) table[i] = how == IN_8 || how == IN_16 ? s->levels[i & ((1 << s->bits) - 1)] : 0;
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

/* ---- transforms ---- */

/* out[r, j] = sum over i of y[i, r] h[i, j] for R of r and NV vectors of j. */
INLINE void rotate_some(int R, int NV, const float *h, int64_t step, int64_t f, const float *y, int64_t rest,
                        float *out) {
    vf sum[4][2];
    UNROLL
    for (int r = 0; r < R; r++) UNROLL
    for (int v = 0; v < NV; v++) sum[r][v] = v_zero();
    for (int64_t i = 0; i < f; i++, h += step, y += rest) {
        vf row[2];
        UNROLL
        for (int v = 0; v < NV; v++) row[v] = v_load(h + v * VL);
        UNROLL
        for (int r = 0; r < R; r++) {
            const vf x = v_set(y[r]);
            UNROLL
            for (int v = 0; v < NV; v++) sum[r][v] = v_fma(row[v], x, sum[r][v]);
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) UNROLL
    for (int v = 0; v < NV; v++) v_store(out + r * f + v * VL, sum[r][v]);
}

/* Rows of `out` come in order and their vectors from behind: what one leaves behind a row is replaced later. */
static void form_rotate(const float *h, int64_t f, const float *y, int64_t rest, float *out) {
    const int64_t step = round_up(f, TQ_ROOM), vectors = (f + VL - 1) / VL;
    for (int64_t r = 0; r < rest;) {
        const int R = rest - r >= 4 ? 4 : 1;
        for (int64_t v = vectors; v > 0;) {
            const int NV = v % 2 ? 1 : 2;
            v -= NV;
            const float *from = h + v * VL;
            float *to = out + r * f + v * VL;
            if (R == 4 && NV == 2) rotate_some(4, 2, from, step, f, y + r, rest, to);
            else if (R == 4) rotate_some(4, 1, from, step, f, y + r, rest, to);
            else if (NV == 2) rotate_some(1, 2, from, step, f, y + r, rest, to);
            else rotate_some(1, 1, from, step, f, y + r, rest, to);
        }
        r += R;
    }
}

/* ---- general: any stage, row by row ---- */

/* The levels of `count` symbols of one tile from symbol `first` on, as [count, dimension]. */
INLINE void symbols_to_levels(const tq_stage *s, const uint8_t *tile, const float *book, int64_t first, int64_t count,
                              int p, float *out) {
    const int64_t tile_bits = tq_tile_bits(s);
    const int bits = s->bits, window = s->window;
    const uint32_t mask = (1u << window) - 1;
    int64_t t = 0, at = first * bits;
    for (; t < count && (at >> 3) + 4 <= tile_bits >> 3;
         t++, at += bits) { /* a whole word lies ahead, hence a window */
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
    float *scratch = tq_alloc((size_t)(3 * s->cols) * sizeof(float));
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
    float *scratch = tq_alloc((size_t)(2 * s->cols) * sizeof(float));
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

static lookup choose_rows(const tq_stage *s) {
#ifdef HAS_BYTES
    if (s->bits > 4) return IN_BYTES;
#endif
    return choose_lookup(s);
}

/* A block is `per` vectors. This is the column of the block that lane l of the k-th of them stands for. */
INLINE int64_t column_of(lookup how, int per, int k, int l) {
    return how == IN_BYTES ? 16 * (l / 4) + 4 * k + l % 4 : (int64_t)l * per + k;
}

INLINE int rows_per(lookup how, int bits) {
    return how == IN_MEMORY ? 1 : how == IN_BYTES ? 4 : 8 * word_stride(bits) / bits;
}

static int rows_fit(const tq_stage *s) {
    if (s->dimension != 1 || s->levels_per_row || s->window != s->bits || s->tile_cols != s->cols) return 0;
    if (s->tile_rows > 1 && s->cols * s->bits % 8) return 0;
    const lookup how = choose_rows(s); /* each lane of a block has one scale */
    const int64_t same = how == IN_BYTES ? 16 : rows_per(how, s->bits);
    return s->vector_length == s->cols || s->vector_length % same == 0;
}

/* sums[j][b] += the products of `blocks` blocks of R rows, `row_step` bytes apart, with NB rows of z in the order of
 * the lanes, `step` apart. R * NB sums hide the latency of the additions, and each load of z serves R rows. lanes are
 * the scales of each row's lanes, `blocks` vectors a row, or NULL where one scale serves the whole row. */
INLINE void rows_dot(lookup how, int R, int NB, const uint8_t *p, int64_t row_step, int64_t blocks, int bits,
                     vtable table, const float *z, int64_t step, const float *lanes, vf sums[4][4]) {
    const int stride = word_stride(bits), per = 8 * stride / bits;
    const vi shift = vi_set((uint32_t)bits);
    const int64_t ahead = round_up(AHEAD, R * row_step);
    for (int64_t i = 0; i < blocks; i++, p += VL * stride, z += per * VL) {
        vf part[4][4];
        vi word[4];
        UNROLL
        for (int j = 0; j < R; j++) {
            prefetch(p + j * row_step, ahead);
            word[j] = v_words(p + j * row_step, stride);
            UNROLL
            for (int b = 0; b < NB; b++) part[j][b] = lanes ? v_zero() : sums[j][b];
        }
        for (int k = 0; k < per; k += 4) UNROLL
        for (int l = 0; l < 4; l++) {
            vf x[4];
            UNROLL
            for (int b = 0; b < NB; b++) x[b] = v_load(z + b * step + (k + l) * VL);
            UNROLL
            for (int j = 0; j < R; j++) {
                const vf level = look_up(how, table, word[j]);
                word[j] = vi_shr(word[j], shift);
                UNROLL
                for (int b = 0; b < NB; b++) part[j][b] = v_fma(level, x[b], part[j][b]);
            }
        }
        UNROLL
        for (int j = 0; j < R; j++) UNROLL
        for (int b = 0; b < NB; b++)
            sums[j][b] = lanes ? v_fma(part[j][b], v_load(lanes + (j * blocks + i) * VL), sums[j][b]) : part[j][b];
    }
}

/* The same for 5 to 8 bits, a block being VL columns; the look-ups hide the latency of the additions. */
INLINE void rows_dot_memory(int NB, const uint8_t *p, int64_t blocks, int bits, const float *levels, const float *z,
                            int64_t step, const float *lanes, vf *sums) {
    for (int64_t i = 0; i < blocks; i++, z += VL) {
        vf level = v_lookup(levels, p, i * VL * bits, bits, (1u << bits) - 1);
        if (lanes) level = v_mul(level, v_load(lanes + i * VL));
        UNROLL
        for (int b = 0; b < NB; b++) sums[b] = v_fma(level, v_load(z + b * step), sums[b]);
    }
}

#ifdef HAS_BYTES
/* The same by 64 symbols as bytes, each of the four bytes of their levels from a table of its own. */
INLINE void rows_dot_bytes(int NB, const uint8_t *p, int64_t blocks, int bits, const vbytes *table, const float *z,
                           int64_t step, const float *lanes, vf *sums) {
    for (int64_t i = 0; i < blocks; i++, p += 8 * bits, z += 4 * VL) {
        vf level[4];
        prefetch(p, AHEAD);
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
    const int bits = s->bits, per = rows_per(how, bits);
    const int64_t block_cols = (int64_t)per * VL, blocks = (s->cols + block_cols - 1) / block_cols,
                  step = blocks * block_cols;
    const int64_t vectors = s->cols / s->vector_length, row_bytes = (s->cols * bits + 7) / 8;
    const int64_t read = (step * bits + 7) / 8 + PAD; /* bytes that loads may reach to from the start of a row */
    float *scratch = tq_alloc((size_t)(batch * (step + vectors) + (4 * blocks + 1) * VL + 2 * vectors) * sizeof(float));
    uint8_t *last = tq_alloc((size_t)(4 * read));
    if (!scratch || !last) {
        free(scratch);
        free(last);
        return TQ_MEMORY;
    }
    float *lanes = scratch + batch * step, *scale = lanes + (4 * blocks + 1) * VL, *offset = scale + vectors,
          *sums = offset + vectors;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < blocks; i++)
            for (int k = 0; k < per; k++)
                for (int l = 0; l < VL; l++) {
                    int64_t c = i * block_cols + column_of(how, per, k, l);
                    scratch[b * step + i * block_cols + k * VL + l] = c < s->cols ? z[b * s->cols + c] : 0;
                }
    memset(lanes, 0, (size_t)(4 * blocks * VL) * sizeof(float));
    if (s->offsets.data) vector_sums(s, z, batch, sums);
    const vtable table = load_table(s, how);
#ifdef HAS_BYTES
    vbytes bytes;
    memset(&bytes, 0, sizeof bytes);
    if (how == IN_BYTES) v_bytes_load(s->levels, bits, &bytes);
#endif
    const int in_registers = how == IN_8 || how == IN_16;
    for (int64_t r = begin; r < end;) {
        const int64_t at = r / s->tile_rows * tq_tile_bytes(s) + r % s->tile_rows * row_bytes;
        const int64_t n = in_registers && end - r >= 4 ? 4 : 1; /* rows at once; they follow each other without gaps */
        const uint8_t *p = s->codes + at;
        int64_t row_step = row_bytes;
        if (at + (n - 1) * row_bytes + read > s->codes_bytes) { /* loads would pass the end of all codes: read copies */
            memset(last, 0, (size_t)(n * read));
            for (int64_t j = 0; j < n; j++) memcpy(last + j * read, p + j * row_bytes, (size_t)row_bytes);
            p = last;
            row_step = read;
        }
        float row_scale[4];
        for (int64_t j = 0; j < n; j++) {
            tq_factor_row(&s->scales, vectors, r + j, scale);
            row_scale[j] = scale[0];
            if (vectors == 1) continue;
            float *to = lanes + j * blocks * VL, *stop = to + blocks * VL;
            for (int64_t v = 0; v < vectors; v++, to += s->vector_length / per) /* whole vectors: the next store */
                for (int64_t e = 0; e < s->vector_length / per; e += VL) v_store(to + e, v_set(scale[v]));
            if (to < stop) v_store(to, v_zero()); /* replaces what one leaves behind its end */
        }
        const float *with = vectors > 1 ? lanes : NULL;
        for (int64_t b = 0; b < batch;) {
            const int64_t left = batch - b;
            const int NB = left >= 4 ? 4 : left >= 2 ? 2 : 1, R = n == 1 ? 1 : 4 / NB;
            const float *zb = scratch + b * step;
            for (int64_t j = 0; j < n; j += R) {
                const uint8_t *pj = p + j * row_step;
                const float *lanes_j = with ? with + j * blocks * VL : NULL;
                vf sum[4][4];
                for (int i = 0; i < 4; i++)
                    for (int k = 0; k < 4; k++) sum[i][k] = v_zero();
#define DOT(HOW, R, NB) rows_dot(HOW, R, NB, pj, row_step, blocks, bits, table, zb, step, lanes_j, sum)
#define DOTS(R, NB)                                                                  \
    if (how == IN_8) {                                                               \
        DOT(IN_8, R, NB);                                                            \
    } else if (how == IN_16) {                                                       \
        DOT(IN_16, R, NB);                                                           \
    } else if (R == 4 / NB && NB < 4) {                                              \
        (void)0;                                                                     \
    } else if (how == IN_MEMORY && bits == 8) {                                      \
        rows_dot_memory(NB, pj, blocks, 8, s->levels, zb, step, lanes_j, sum[0]);    \
    } else if (how == IN_MEMORY) {                                                   \
        rows_dot_memory(NB, pj, blocks, bits, s->levels, zb, step, lanes_j, sum[0]); \
    } else {                                                                         \
        DOT_BYTES(NB);                                                               \
    }
#ifdef HAS_BYTES
#define DOT_BYTES(NB) rows_dot_bytes(NB, pj, blocks, bits, &bytes, zb, step, lanes_j, sum[0])
#else
#define DOT_BYTES(NB) (void)0
#endif
                if (NB == 4) {
                    DOTS(1, 4)
                } else if (R == 2) {
                    DOTS(2, 2)
                } else if (NB == 2) {
                    DOTS(1, 2)
                } else if (R == 4) {
                    DOTS(4, 1)
                } else {
                    DOTS(1, 1)
                }
                for (int i = 0; i < R; i++)
                    for (int k = 0; k < NB; k++)
                        y[(b + k) * s->rows + r + j + i] = v_sum(sum[i][k]) * (with ? 1 : row_scale[j + i]);
            }
            b += NB;
        }
        for (int64_t j = 0; s->offsets.data && j < n; j++) {
            tq_factor_row(&s->offsets, vectors, r + j, offset);
            for (int64_t b = 0; b < batch; b++) y[b * s->rows + r + j] += dot(offset, sums + b * vectors, vectors);
        }
        r += n;
    }
    free(scratch);
    free(last);
    return TQ_OK;
}

/* ---- columns ---- */

static int columns_fit(const tq_stage *s) {
    if (s->dimension != 1 || s->levels_per_row || s->tile_cols != 1) return 0;
    if (s->window > s->bits && s->tile_rows * s->bits % 8) return 0; /* the wrap is done by bytes */
    return 7 * s->bits + s->window <= 64;                            /* v_lookup takes 8 symbols from 8 bytes */
}

/* How the symbols of a tile lie in [per][lanes] floats: by words, symbol k of word i in [k][i]; from memory, VL to a
 * row. */
typedef struct {
    int64_t per, lanes, size;
} layout;

/* Bytes from word to word where levels are computed: a word's second half is read from its middle, so that the 4 bytes
 * there hold the windows of up to 16 bits of its symbols. */
INLINE int computed_stride(int bits) { return bits < 3 ? 2 : bits; }

static lookup choose_columns(const tq_stage *s) {
#ifdef HAS_COMPUTED
    if (s->window > s->bits && s->bits <= 4 && s->computed > 0) return COMPUTED;
#endif
#ifdef HAS_PAIRS
    if (s->window > s->bits && s->pairs && s->bits <= 4 && 15 * s->bits + s->window <= 64) return IN_PAIRS;
#endif
    return choose_lookup(s);
}

static layout choose_layout(const tq_stage *s, lookup how) {
    layout l;
    if (how >= IN_PAIRS) {
        l.lanes = VL;
        l.per = round_up(s->tile_rows, how == IN_PAIRS ? PAIRS : VL) / VL;
    } else {
        l.per = 8 * (how == COMPUTED ? computed_stride(s->bits) : word_stride(s->bits)) / s->bits;
        l.lanes = round_up((s->tile_rows + l.per - 1) / l.per, VL);
    }
    l.size = l.per * l.lanes;
    return l;
}

INLINE int64_t place(lookup how, layout l, int64_t i) { return how >= IN_PAIRS ? i : i % l.per * l.lanes + i / l.per; }

#ifndef HAS_COMPUTED
#define v_computed(symbols) ((void)(symbols), v_zero()) /* never called */
#endif

/* sums[b][k0 to k0 + K - 1][g to g + VL - 1] += level * z over n columns, for NB rows of z. */
INLINE void columns_add(lookup how, int K, int NB, int bits, const tq_stage *s, layout l, const uint8_t *p,
                        int64_t tile_step, int n, int64_t g, int64_t k0, vtable table, const float *z, float *sums) {
    const int stride = how == COMPUTED ? computed_stride(bits) : word_stride(bits);
    const uint32_t mask = (1u << s->window) - 1;
    /* of a computed word: where its second half begins, and whether this call begins in it */
    const int middle = 8 * stride / 2, second = how == COMPUTED && 2 * k0 >= l.per;
    const int both = how == COMPUTED && K == 8 && bits > 1; /* 8 symbols are both halves */
    const int64_t shift0 = k0 * bits - (second ? middle & ~7 : 0);
    const vi first = vi_set((uint32_t)shift0), shift = vi_set((uint32_t)bits), masks = vi_set(mask);
    vi shifts[8]; /* of a computed word's symbols: shifts that do not wait for each other */
    UNROLL
    for (int k = 0; k < K; k++)
        shifts[k] = vi_set((uint32_t)(both && k >= 4 ? (middle & 7) + (k - 4) * bits : shift0 + k * bits));
    const float *levels = s->levels;
    const int64_t z_step = s->cols;
    vf sum[4][8];
    const int64_t at = k0 * VL * bits, rest = VL % 8 ? at & 7 : 0; /* four symbols may end within a byte */
    p += how >= IN_PAIRS ? at >> 3 : g * stride + (second ? middle >> 3 : 0);
    UNROLL
    for (int b = 0; b < NB; b++) UNROLL
    for (int k = 0; k < K; k++) sum[b][k] = v_load(sums + b * l.size + (k0 + k) * l.lanes + g);
    for (int c = 0; c < n; c++, p += tile_step) {
        vf x[4];
        UNROLL
        for (int b = 0; b < NB; b++) x[b] = v_set(z[b * z_step + c]);
        vi word = how >= IN_PAIRS ? first : v_words(p, stride);
        const vi second_half = both ? v_words(p + (middle >> 3), stride) : word;
        if (how < COMPUTED) word = vi_shr(word, first);
        vf pairs[8];
#ifdef HAS_PAIRS
        UNROLL
        for (int k = 0; how == IN_PAIRS && k < K; k += PAIRS / VL)
            v_pairs(s->pairs, p + k * VL * bits / 8, bits, mask << bits | mask, pairs + k);
#endif
        UNROLL
        for (int k = 0; k < K; k++) {
            vf level = how == COMPUTED    ? v_computed(vi_and(vi_shr(k < 4 ? word : second_half, shifts[k]), masks))
                       : how == IN_PAIRS  ? pairs[k]
                       : how == IN_MEMORY ? v_lookup(levels, p, rest + k * VL * bits, bits, mask)
                                          : look_up(how, table, word);
            if (how < COMPUTED) word = vi_shr(word, shift);
            UNROLL
            for (int b = 0; b < NB; b++) sum[b][k] = v_fma(level, x[b], sum[b][k]);
        }
    }
    UNROLL
    for (int b = 0; b < NB; b++) UNROLL
    for (int k = 0; k < K; k++) v_store(sums + b * l.size + (k0 + k) * l.lanes + g, sum[b][k]);
}

/* The whole tile, K times NB being 8 sums at a time. `per` of words is a multiple of 8; from memory the rest goes in
 * the smallest steps. */
INLINE void columns_add_all(lookup how, int K, int NB, int bits, const tq_stage *s, layout l, const uint8_t *p,
                            int64_t tile_step, int n, vtable table, const float *z, float *sums) {
    const int least = how == IN_PAIRS ? PAIRS / VL : 1;
    for (int64_t g = 0; g < l.lanes; g += VL) {
        int64_t k0 = 0;
        for (; k0 + K <= l.per; k0 += K) columns_add(how, K, NB, bits, s, l, p, tile_step, n, g, k0, table, z, sums);
        if (how >= IN_PAIRS)
            for (; k0 < l.per; k0 += least)
                columns_add(how, least, NB, bits, s, l, p, tile_step, n, g, k0, table, z, sums);
    }
}

/* Copies n tiles to `to`, tile_step apart, each followed by its own beginning, where a trellis goes on [TQ-CODE-6]. */
static void copy_tiles(const uint8_t *from, int64_t tile_bytes, int n, uint8_t *to, int64_t tile_step) {
    for (int c = 0; c < n; c++, from += tile_bytes, to += tile_step) {
        int64_t i = 0;
        for (; i + 4 * VL <= tile_bytes; i += 4 * VL) memcpy(to + i, from + i, 4 * VL); /* instructions, not a call */
        for (; i < tile_bytes; i++) to[i] = from[i];
        for (i = 0; i < tile_bytes; i += 64) prefetch(from + i, AHEAD);
        if (tile_bytes >= 4) memcpy(to + tile_bytes, from, 4);
        else
            for (i = 0; i < 4; i++) to[tile_bytes + i] = to[i % tile_bytes];
    }
}

static int columns_product(const tq_stage *s, const float *z, float *y, int64_t batch, int64_t begin, int64_t end) {
    const lookup how = choose_columns(s);
    const layout l = choose_layout(s, how);
    const int64_t tile_bytes = tq_tile_bytes(s), tile_step = round_up((l.size * s->bits + 7) / 8 + PAD, 64);
    const int64_t vectors = s->cols / s->vector_length, height = s->tile_rows;
    const int64_t most = min64(s->window > s->bits ? 4 * CHUNK : CHUNK, s->vector_length);
    /* tiles, sums of the vector at hand, sums of all, sums of z by vectors */
    const size_t size = (size_t)(most * tile_step) + (size_t)(batch * (2 * l.size + vectors)) * sizeof(float);
    uint8_t *tiles = tq_alloc(size);
    if (!tiles) return TQ_MEMORY;
    memset(tiles, 0, size);
    float *part = (float *)(tiles + most * tile_step), *total = part + batch * l.size, *sums = total + batch * l.size;
    if (s->offsets.data) vector_sums(s, z, batch, sums);
    const vtable table = load_table(s, how);
    const float unit = how == COMPUTED ? s->computed : 1;
    for (int64_t r = begin; r < end; r += height) {
        memset(total, 0, (size_t)(batch * l.size) * sizeof(float));
        for (int64_t v = 0; v < vectors; v++) {
            memset(part, 0, (size_t)(batch * l.size) * sizeof(float));
            const int64_t stop = (v + 1) * s->vector_length;
            for (int64_t c = v * s->vector_length; c < stop; c += most) {
                const int n = (int)min64(most, stop - c);
                const int64_t at = (r / height * s->cols + c) * tile_bytes, read = n * tile_bytes + tile_step;
                const uint8_t *p = s->codes + at;
                int64_t step = tile_bytes;
                if (s->window > s->bits || at + read > s->codes_bytes) { /* what follows a tile is not read elsewhere */
                    copy_tiles(p, tile_bytes, n, tiles, tile_step);
                    p = tiles;
                    step = tile_step;
                } else {
                    for (int64_t i = 0; i < n * tile_bytes; i += 64) prefetch(p + i, AHEAD);
                }
                for (int64_t b = 0; b < batch;) {
                    const int64_t left = batch - b;
                    const float *x = z + b * s->cols + c;
                    float *to = part + b * l.size;
#define ADD(HOW, K, NB, BITS) columns_add_all(HOW, K, NB, BITS, s, l, p, step, n, table, x, to)
#define ADD_TWO(HOW, K, NB)       \
    if (s->bits == 2) {           \
        ADD(HOW, K, NB, 2);       \
    } else {                      \
        ADD(HOW, K, NB, s->bits); \
    }
#define ADDS(K, NB)                                             \
    if (how == IN_8) {                                          \
        ADD(IN_8, K, NB, s->bits);                              \
    } else if (how == IN_16) {                                  \
        ADD(IN_16, K, NB, 4);                                   \
    } else if (how == COMPUTED) {                               \
        ADD_TWO(COMPUTED, K, NB);                               \
    } else if (how == IN_PAIRS) {                               \
        ADD_TWO(IN_PAIRS, K < PAIRS / VL ? PAIRS / VL : K, NB); \
    } else if (s->bits == 3) {                                  \
        ADD(IN_MEMORY, K, NB, 3);                               \
    } else {                                                    \
        ADD_TWO(IN_MEMORY, K, NB);                              \
    }                                                           \
    b += NB
                    if (left >= 4) {
                        ADDS(2, 4);
                    } else if (left >= 2) {
                        ADDS(4, 2);
                    } else {
                        ADDS(8, 1);
                    }
                }
            }
            for (int64_t i = 0; i < height; i++) {
                const float scale = tq_factor(&s->scales, vectors, r + i, v) * unit;
                const float offset = s->offsets.data ? tq_factor(&s->offsets, vectors, r + i, v) : 0;
                for (int64_t b = 0, at = place(how, l, i); b < batch; b++, at += l.size) {
                    total[at] += scale * part[at];
                    if (s->offsets.data) total[at] += offset * sums[b * vectors + v];
                }
            }
        }
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < height; i++) y[b * s->rows + r + i] = total[b * l.size + place(how, l, i)];
    }
    free(tiles);
    return TQ_OK;
}

/* The levels of one tile, in its layout. */
INLINE void columns_levels(lookup how, const tq_stage *s, layout l, const uint8_t *p, vtable table, float *levels) {
    const int bits = s->bits, stride = word_stride(bits);
    if (how == IN_MEMORY) {
        for (int64_t i = 0; i < l.size; i += VL)
            v_store(levels + i, v_lookup(s->levels, p, i * bits, bits, (1u << s->window) - 1));
        return;
    }
    const vi shift = vi_set((uint32_t)bits);
    for (int64_t g = 0; g < l.lanes; g += VL) {
        vi word = v_words(p + g * stride, stride);
        for (int64_t k = 0; k < l.per; k++, word = vi_shr(word, shift))
            v_store(levels + k * l.lanes + g, look_up(how, table, word));
    }
}

/* Levels of some columns go to a buffer, and from there to their rows, 64 bytes at a time. */
static int columns_decode(const tq_stage *s, float *out, int64_t begin, int64_t end) {
    const int64_t N = min64(16, s->vector_length);
    const lookup how = choose_lookup(s);
    const layout l = choose_layout(s, how);
    const int64_t tile_bytes = tq_tile_bytes(s), tile_step = round_up((l.size * s->bits + 7) / 8 + PAD, 64);
    const int64_t vectors = s->cols / s->vector_length, height = s->tile_rows;
    const size_t size = (size_t)(N * tile_step) + (size_t)(N * l.size + 2 * height) * sizeof(float);
    uint8_t *tiles = tq_alloc(size);
    if (!tiles) return TQ_MEMORY;
    memset(tiles, 0, size);
    float *levels = (float *)(tiles + N * tile_step), *scale = levels + N * l.size, *offset = scale + height;
    const vtable table = load_table(s, how);
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
                for (int j = 0; j < n; j++) {
                    const uint8_t *p = tiles + j * tile_step;
                    float *to = levels + j * l.size;
                    if (how == IN_8) columns_levels(IN_8, s, l, p, table, to);
                    else if (how == IN_16) columns_levels(IN_16, s, l, p, table, to);
                    else columns_levels(IN_MEMORY, s, l, p, table, to);
                }
                for (int64_t r = r0; r < r1; r++) {
                    const int64_t i = r - tile, at = place(how, l, i);
                    float *to = out + (r - begin) * s->cols + c;
                    for (int j = 0; j < n; j++) to[j] = scale[i] * levels[j * l.size + at] + offset[i];
                }
            }
        }
    }
    free(tiles);
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

const tq_form FORM_NAME(FORM) = {FORM_STRING(FORM), form_is_fast, form_product, form_decode, form_row, form_rotate, form_search};
