/* Products with packed weights: the C interface of tqformat-kernels.
 *
 * A tq_weight is the sum of stages, each in the coordinates of a transform. A tq_stage describes one stage of a
 * quantized weight, as SPEC.md, sections 6 to 10, lays it out in memory: every array is contiguous, row-major and
 * little-endian; floats and indices are aligned to their size, codes, scales and offsets need not be. Each function
 * first checks the stage: shapes that break a rule, and lengths that do not fit the shapes, are TQ_SHAPE, and nothing
 * is read. Symbols have `window` bits and levels 2^window entries, so that no code can point outside them. Nothing is
 * kept between calls; calls may run at once, also on one stage.
 */
#ifndef TQFORMAT_KERNELS_H
#define TQFORMAT_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define TQ_API __declspec(dllexport)
#else
#define TQ_API __attribute__((visibility("default")))
#endif

#define TQ_ABI 4 /* changes with any change of a struct or of a function */

enum { TQ_OK = 0, TQ_SHAPE = 1, TQ_RANGE = 2, TQ_MEMORY = 3 };

enum { TQ_F32, TQ_F16, TQ_BF16, TQ_U8, TQ_I8, TQ_F8_E4M3, TQ_F8_E8M0, TQ_DTYPES };

/* Scales or offsets, each element times its outer one [TQ-NUM-8]; data is NULL where a stage has no offsets. */
typedef struct {
    const void *data;  /* [rows, cols / vector_length] */
    const void *outer; /* [outer_rows, outer_cols], or NULL for 1 */
    int64_t bytes, outer_bytes;
    int64_t outer_rows, outer_cols; /* rows or 1; a divisor of cols / vector_length */
    int32_t dtype, outer_dtype;
} tq_factors;

typedef struct {
    const uint8_t *codes;  /* [rows * cols / (tile_rows * tile_cols), tile_bytes] */
    const float *levels;   /* [2^window, dimension], or [rows, 2^window, dimension]; finite */
    const uint16_t *pairs; /* [2^(window + bits), 2] or NULL: the levels of neighbours in a trellis, in binary16 */
    int64_t codes_bytes, levels_count, pairs_count;
    tq_factors scales, offsets;
    int64_t rows, cols, vector_length, tile_rows, tile_cols;
    int32_t bits, window, dimension;
    int32_t levels_per_row; /* 1: each row has its own codebook; 0: they share one */
    float computed; /* not 0: level s is this times (the sum of the bytes of s * 0x83DCD12D mod 2^32, less 510) */
    int32_t unused;
} tq_stage;

/* T of a transform of the kind hadamard, on blocks of `size` columns [TQ-TRAN-3]: y -> (H_1 (x) H_2 ...) (signs y). */
typedef struct {
    const float *signs; /* [size], +-1 / sqrt(size) */
    const float
        *matrices; /* H_1, H_2, ..., each transposed: [f, f rounded up to a multiple of 16], zeros in the rest */
    const int32_t *factors;       /* f of each; their product is size */
    int64_t matrices_count, size; /* size divides the columns of a weight */
    int32_t count, unused;
} tq_transform;

/* W = (sum over stages of T^-1(scale * level + offset)) * column_scale [TQ-STAGE-2, TQ-NUM-2]. */
typedef struct {
    const tq_stage *const *stages;         /* all of the same rows and columns */
    const tq_transform *const *transforms; /* of each stage; NULL for one that has none */
    const void *column_scale;              /* [cols], or NULL for 1 */
    int64_t column_scale_bytes;
    int32_t column_scale_dtype, count; /* TQ_F32, TQ_F16 or TQ_BF16; stages */
} tq_weight;

/* What a quantizer asks for: the codes of a tile [rows, 1] in each of `cols` columns, rows along memory. */
typedef struct {
    float *targets;      /* [cols, rows], changed where there is feedback */
    const float *scales; /* [groups, rows]: a column's targets are levels times these; 0 asks for nothing */
    const float *roots;  /* [groups, rows]: the squares say what an error in units of the scale counts */
    const float *upper;  /* [cols, cols], upper triangular, the diagonal not 0; or NULL for no feedback */
    const float *levels; /* [2^window] */
    uint16_t *symbols;   /* [cols, rows], the result */
    int64_t rows, cols, groups; /* groups divides cols */
    int64_t overlap;            /* symbols on either side of a tile's begin by which its state there is found */
    int32_t bits, window;       /* a trellis: 1 to 8, and at least 4 more than bits, up to 16 */
} tq_search;

/* TQ_ABI of the library. */
TQ_API int32_t tq_abi(void);

/* The name of form number i (0: portable, then better ones); NULL where there is none, or the processor cannot run it.
 */
TQ_API const char *tq_form_name(int32_t i);

/* TQ_OK if the other functions would take this stage. */
TQ_API int32_t tq_check(const tq_stage *stage);

/* 1 if tq_product takes a vector path for this stage in this form, 0 if the general one. */
TQ_API int32_t tq_is_fast(const tq_stage *stage, int32_t form);

/* y[b, r] = sum over columns c of (scale * level + offset)[r, c] * z[b, c] for r from row_begin to row_end - 1, both
 * multiples of tile_rows. z is [batch, cols], y [batch, rows]; other rows of y are left alone. Sums are binary32. */
TQ_API int32_t tq_product(const tq_stage *stage, const float *z, int64_t z_count, float *y, int64_t y_count,
                          int64_t batch, int64_t row_begin, int64_t row_end, int32_t form);

/* The same, rows divided among up to `threads` threads that `parallel` gives: it calls work(data) in each of them, and
 * returns when all have; none may call it later. What they leave undone is done here. GOMP_parallel of GNU's and LLVM's
 * OpenMP is such a function; its threads are those that torch uses, so that none has to wait for a processor which a
 * waiting one keeps busy. */
typedef void (*tq_parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
TQ_API int32_t tq_product_parallel(const tq_stage *stage, const float *z, int64_t z_count, float *y, int64_t y_count,
                                   int64_t batch, int64_t row_begin, int64_t row_end, int32_t form, int32_t threads,
                                   tq_parallel parallel);

/* TQ_OK if tq_linear would take this weight. */
TQ_API int32_t tq_check_weight(const tq_weight *weight);

/* y = W x: [batch, cols] -> [batch, rows], x and y of the types TQ_F32, TQ_F16 or TQ_BF16, computed in binary32 as
 * T(column_scale * x) and the products of the stages with it [TQ-FUSE-1]. In `threads` threads of `parallel`, as above,
 * or in this one where that is NULL. */
TQ_API int32_t tq_linear(const tq_weight *weight, const void *x, int32_t x_dtype, int64_t x_count, void *y,
                         int32_t y_dtype, int64_t y_count, int64_t batch, int32_t form, int32_t threads,
                         tq_parallel parallel);

/* out[r - row_begin, c] = (scale * level + offset)[r, c], before T^-1; out is [row_end - row_begin, cols]. */
TQ_API int32_t tq_decode(const tq_stage *stage, float *out, int64_t out_count, int64_t row_begin, int64_t row_end,
                         int32_t form);

/* The same for the rows index[0], index[1], ...; out is [count, cols]. An index that is no row is TQ_RANGE. */
TQ_API int32_t tq_rows(const tq_stage *stage, float *out, int64_t out_count, const int64_t *index, int64_t count,
                       int32_t form);

/* The symbols whose levels are nearest to the targets, as a tail-biting path of a trellis [TQ-CODE-6] found by the
 * Viterbi algorithm in two runs (QTIP, arXiv:2406.11235, algorithm 4), column by column. What a column c misses, times
 * upper[c, j] / upper[c, c], is then taken off each column j behind it (GPTQ, arXiv:2210.17323, algorithm 1). Sizes are
 * checked, the lengths of the arrays follow from them. */
TQ_API int32_t tq_encode(const tq_search *search, int32_t form);

#endif
