/* Random stages, right and wrong, through every form, in buffers of the exact size, so that a sanitizer sees any byte
 * that is read or written outside them. All forms must agree with the portable one to 2^-16 of the sum of magnitudes,
 * and 2^-126; what tq_check refuses, the other functions must refuse. Right stages make weights of one or two stages
 * with random transforms, right and wrong, of which the same is asked. Usage: fuzz SECONDS [SEED]; fuzz.sh builds it.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tqformat_kernels.h"

static uint64_t state;

static uint64_t draw(void) { /* SplitMix64 */
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static int64_t upto(int64_t n) { return (int64_t)(draw() % (uint64_t)(n + 1)); }

static int64_t divisor(int64_t n) {
    if (n < 1) return 1 + upto(8);
    int64_t d = 1 + upto(n - 1);
    while (n % d) d--;
    return upto(3) ? d : n;
}

static int64_t odd(void) { /* numbers that break things */
    static const int64_t some[] = {
        0, -1, 1, 2, 17, 255, INT32_MAX, INT64_MAX, INT64_MIN, (int64_t)1 << 53, (int64_t)1 << 20, 4097};
    return some[upto(11)];
}

static void *bytes(int64_t n) { /* exactly n of them; random, but small as floats of any width */
    uint8_t *p = malloc((size_t)n ? (size_t)n : 1);
    for (int64_t i = 0; i < n; i++) p[i] = (uint8_t)(draw() & 0x3b);
    return p;
}

static float *floats(int64_t n) {
    float *p = malloc((size_t)(n ? n : 1) * sizeof(float));
    for (int64_t i = 0; i < n; i++) p[i] = (float)upto(2000) / 1000 - 1;
    return p;
}

/* The same bytes, of exactly that many, at an odd address: codes, scales and offsets need not be aligned. */
static void *moved(void *from, int64_t n) {
    uint8_t *p = malloc((size_t)n + 1);
    memcpy(p + 1, from, (size_t)n);
    free(from);
    return p + 1;
}

static void free_moved(const void *p) {
    if (p) free((uint8_t *)p - 1);
}

static int size_of(int32_t dtype) { return dtype == TQ_F32 ? 4 : dtype == TQ_F16 || dtype == TQ_BF16 ? 2 : 1; }

static tq_factors factors(int64_t rows, int64_t n) {
    tq_factors f = {.dtype = (int32_t)upto(TQ_DTYPES - 1)};
    f.bytes = rows * n * size_of(f.dtype);
    f.data = bytes(f.bytes);
    if (f.dtype == TQ_F32) {
        free((void *)f.data);
        f.data = floats(rows * n);
    }
    f.data = moved((void *)f.data, f.bytes);
    if (f.dtype >= TQ_U8 || !upto(3)) {
        f.outer_dtype = (int32_t)upto(TQ_BF16);
        f.outer_rows = upto(1) ? rows : 1;
        f.outer_cols = divisor(n);
        f.outer_bytes = f.outer_rows * f.outer_cols * size_of(f.outer_dtype);
        f.outer = f.outer_dtype == TQ_F32 ? (void *)floats(f.outer_rows * f.outer_cols) : bytes(f.outer_bytes);
        f.outer = moved((void *)f.outer, f.outer_bytes);
    }
    return f;
}

static void fail(const char *what, const tq_stage *s) {
    fprintf(stderr, "%s: rows %lld cols %lld tile %lld %lld G %lld bits %d window %d p %d per row %d\n", what,
            (long long)s->rows, (long long)s->cols, (long long)s->tile_rows, (long long)s->tile_cols,
            (long long)s->vector_length, s->bits, s->window, s->dimension, s->levels_per_row);
    abort();
}

/* Teams that call too seldom, as often as asked, and more often, one after the other. */
static void none(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    (void)work, (void)data, (void)threads, (void)flags;
}

static void all(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    for (unsigned i = 0; i < threads + flags; i++) work(data);
}

static void more(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    all(work, data, threads, flags + 3);
}

static tq_parallel team(void) {
    const tq_parallel some[] = {NULL, none, all, more};
    return some[upto(3)];
}

static long linear_taken = 0, linear_refused = 0;

/* A weight of one or two stages s, all of whose arrays have the sizes that it states. */
static void fuzz_weight(const tq_stage *s) {
    int32_t sizes[24] = {0}; /* a wrong count may be greater; factors that are no divisors end the search */
    tq_transform t = {.size = divisor(s->cols), .factors = sizes};
    for (int64_t rest = t.size; rest > 1; rest /= sizes[t.count++]) {
        do sizes[t.count] = (int32_t)divisor(rest);
        while (sizes[t.count] == 1);
        t.matrices_count += sizes[t.count] * (((int64_t)sizes[t.count] + 15) / 16 * 16);
    }
    float *signs = floats(t.size), *matrices = calloc((size_t)t.matrices_count + 1, sizeof(float)), *h = matrices;
    for (int64_t i = 0; i < t.size; i++) signs[i] = (signs[i] < 0 ? -1 : 1) / sqrtf((float)t.size);
    for (int32_t k = 0; k < t.count; k++)
        for (int32_t i = 0; i < sizes[k]; i++, h += (sizes[k] + 15) / 16 * 16)
            for (int32_t j = 0; j < sizes[k]; j++) h[j] = upto(1) ? 1 : -1;
    t.signs = signs;
    t.matrices = matrices;
    const tq_transform right_t = t;
    const tq_stage *stages[2] = {s, s};
    const tq_transform *transforms[2] = {upto(3) ? &t : NULL, upto(1) ? &t : NULL};
    tq_weight w = {.stages = stages, .transforms = transforms, .count = 1 + (int32_t)upto(1)};
    void *scale = NULL;
    if (upto(1)) {
        w.column_scale_dtype = (int32_t)upto(TQ_BF16);
        w.column_scale_bytes = s->cols * size_of(w.column_scale_dtype);
        w.column_scale = scale = w.column_scale_dtype == TQ_F32 ? (void *)floats(s->cols) : bytes(w.column_scale_bytes);
    }
    int64_t batch = 1 + upto(9), x_count = batch * s->cols, y_count = batch * s->rows;
    int32_t x_dtype = (int32_t)upto(TQ_BF16), y_dtype = upto(1) ? TQ_F32 : (int32_t)upto(TQ_BF16);
    void *x = x_dtype == TQ_F32 ? (void *)floats(x_count) : bytes(x_count * size_of(x_dtype));
    const int64_t x_bytes = x_count * size_of(x_dtype), y_bytes = y_count * size_of(y_dtype);
    int wrong = !upto(3);
    if (wrong) {
        int64_t *longs[] = {&t.size, &t.matrices_count, &w.column_scale_bytes, &batch, &x_count, &y_count};
        int32_t *ints[] = {&t.count, &w.column_scale_dtype, &x_dtype, &y_dtype, &sizes[0]};
        if (upto(1)) *longs[upto(5)] += upto(1) ? odd() % 100000 : upto(4) - 2;
        else *ints[upto(4)] += (int32_t)(upto(1) ? odd() % 100000 : upto(4) - 2);
    }
    const int claims = x_count > x_bytes / 4 || y_count > y_bytes / 4 || t.size > right_t.size || t.count > 24 ||
                       t.matrices_count > right_t.matrices_count || w.column_scale_bytes > 2 * s->cols;
    float *first = NULL;
    if (wrong && claims) goto end; /* dtypes may have become wider, too */
    double bound = 0;
    float *u = malloc((size_t)(s->rows * s->cols + 1) * sizeof(float));
    if (tq_decode(s, u, s->rows * s->cols, 0, s->rows, 0)) fail("decode refuses a right stage", s);
    for (int64_t i = 0; i < s->rows * s->cols; i++) bound += fabsf(u[i]);
    free(u);
    for (int32_t form = 0; form < 4; form++) {
        float *y = malloc((size_t)(y_bytes ? y_bytes : 1));
        const int32_t error =
            tq_linear(&w, x, x_dtype, x_count, y, y_dtype, y_count, batch, form, 1 + (int32_t)upto(4), team());
        if (!wrong && error && tq_form_name(form)) fail("a right weight is refused", s);
        if (tq_check_weight(&w) && !error) fail("taken though tq_check_weight refuses it", s);
        linear_taken += !error;
        linear_refused += !!error;
        if (error || y_dtype != TQ_F32) {
            free(y);
        } else if (!first) {
            first = y;
        } else { /* wrong types give any number, NaN too; of right ones |x| and |column_scale| are at most 1, and T
                    makes at most sqrt(size) of that */
            const double most = 0x1p-15 * bound * sqrt((double)right_t.size) + 0x1p-126;
            for (int64_t i = 0; i < y_count; i++)
                if (!wrong && !(fabs((double)y[i] - first[i]) <= most)) fail("forms differ in a layer", s);
            free(y);
        }
    }
end:
    free(first);
    free(x);
    free(scale);
    free(signs);
    free(matrices);
}

static long searches = 0, searches_refused = 0;

/* A search of random sizes, right and wrong; the symbols must be a tail-biting path, and targets must be left alone where
 * there is no feedback. */
static void fuzz_search(void) {
    tq_search s = {.bits = (int32_t)(1 + upto(7)), .overlap = 1 + upto(20), .cols = upto(6), .groups = 1};
    s.window = s.bits + 4 + (int32_t)upto(upto(15) ? 2 : 12 - s.bits);
    s.rows = (s.window + s.bits - 1) / s.bits + upto(40);
    if (s.cols) s.groups = divisor(s.cols);
    const int64_t n = s.rows * s.cols, states = (int64_t)1 << (s.window - s.bits);
    float *targets = floats(n), *scales = floats(s.groups * s.rows), *roots = floats(s.groups * s.rows);
    float *levels = floats((int64_t)1 << s.window), *upper = floats(s.cols * s.cols); /* a diagonal of 0 is no matter */
    uint16_t *symbols = bytes(2 * n);
    s.targets = targets, s.scales = scales, s.roots = roots, s.levels = levels, s.symbols = symbols;
    s.upper = upto(1) ? upper : NULL;
    const int wrong = !upto(3);
    if (wrong) switch (upto(9)) {
            case 0: s.bits = upto(1) ? 0 : 9; break;
            case 1: s.window = s.bits + 3; break;
            case 2: s.window = upto(1) ? 17 : INT32_MAX; break;
            case 3: s.bits = (int32_t)-upto(INT32_MAX); break;
            case 4: s.rows = (s.window - 1) / s.bits; break;
            case 5: s.rows = -upto(1) * INT64_MAX; break;
            case 6: s.cols = -1 - upto(INT64_MAX / 2); break;
            case 7: s.groups = -upto(INT64_MAX - 1); break;
            case 8: s.overlap = -upto(INT64_MAX - 1); break;
            default: s.overlap = (1 << 16) + 1 + upto(INT64_MAX >> 1);
        }
    for (int32_t form = -1; form < 4; form++) {
        const int32_t error = tq_encode(&s, form);
        if (!wrong == !!error && tq_form_name(form)) fail("a search is wrongly taken or refused", &(tq_stage){0});
        searches += !error, searches_refused += !!error;
        for (int64_t i = 0; !error && !wrong && i < n; i++) {
            const int64_t last = i % s.rows ? i - 1 : i + s.rows - 1;
            if (symbols[i] % states != symbols[last] >> s.bits)
                fail("no path", &(tq_stage){.rows = s.rows, .cols = s.cols, .bits = s.bits, .window = s.window});
        }
    }
    free(targets), free(scales), free(roots), free(levels), free(upper), free(symbols);
}

int main(int argc, char **argv) {
    const double limit = argc > 1 ? atof(argv[1]) : 5;
    state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    const time_t start = time(NULL);
    long taken = 0, refused = 0, fast = 0, turns = 0;
    for (; turns % 16 || difftime(time(NULL), start) < limit; turns++) {
        tq_stage s = {0};
        s.dimension = upto(2) ? 1 : (int32_t)(1 + upto(8));
        s.bits = (int32_t)(1 + upto(s.dimension == 1 ? 7 : 15));
        if (s.bits > 8 * s.dimension) s.bits = 8 * s.dimension;
        s.window = upto(1) ? s.bits : s.bits + (int32_t)upto(16 - s.bits);
        s.cols = s.dimension * (upto(1) ? 8 * (1 + upto(40)) : 1 + upto(70));
        const int shape = (int)upto(2); /* rows, columns, anything */
        s.tile_cols = shape == 0 ? s.cols : shape == 1 ? s.dimension : s.dimension * divisor(s.cols / s.dimension);
        s.tile_rows = shape == 0   ? 1 + upto(1)
                      : shape == 1 ? (upto(1) ? 8 * (1 + upto(20)) : 1 + upto(90))
                                   : 1 + upto(6);
        s.rows = s.tile_rows * upto(shape == 1 ? 2 : 5);
        s.vector_length = s.dimension * divisor(s.cols / s.dimension);
        s.levels_per_row = s.window < 9 && !upto(4);
        const int64_t symbols = s.tile_rows * s.tile_cols / s.dimension,
                      tiles = s.rows / s.tile_rows * (s.cols / s.tile_cols);
        s.codes_bytes = tiles * ((symbols * s.bits + 7) / 8);
        s.levels_count = ((int64_t)s.dimension << s.window) * (s.levels_per_row ? s.rows : 1);
        s.scales = factors(s.rows, s.cols / s.vector_length);
        if (!upto(2)) s.offsets = factors(s.rows, s.cols / s.vector_length);
        uint8_t *codes = moved(bytes(s.codes_bytes), s.codes_bytes);
        for (int64_t i = 0; i < s.codes_bytes; i++) codes[i] = (uint8_t)draw(); /* any code is safe */
        float *levels = floats(s.levels_count);
        s.codes = codes;
        s.levels = levels;
        if (s.dimension == 1 && !s.levels_per_row && s.window > s.bits && s.window + s.bits <= 18) {
            s.computed = upto(2) ? 0 : 1 / 128.0f;
            for (int64_t i = 0; i < s.levels_count; i++) {
                const uint32_t h = (uint32_t)i * 0x83DCD12Du;
                if (s.computed > 0)
                    levels[i] = ((float)((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24)) - 510) / 128;
                else levels[i] = (float)(upto(3) - 1) / 2; /* -0.5, 0, 0.5 or 1 */
            }
            if (upto(1)) {
                s.pairs_count = (int64_t)2 << (s.window + s.bits);
                uint16_t *pairs = malloc((size_t)s.pairs_count * 2);
                for (int64_t i = 0; i < s.pairs_count; i++) {
                    const int64_t at = i & 1 ? i >> (1 + s.bits) : (i >> 1) & ((1 << s.window) - 1);
                    pairs[i] = levels[at] == 0 ? 0 : levels[at] == 1 ? 0x3c00 : levels[at] > 0 ? 0x3800 : 0xb800;
                }
                s.pairs = pairs;
            }
        }
        const tq_stage right = s;
        int64_t batch = upto(9), begin = s.tile_rows * upto(s.rows / s.tile_rows), end = s.rows, count = upto(5);
        int64_t z_count = batch * s.cols, y_count = batch * s.rows;
        if (!upto(2)) { /* one to three wrong numbers; the buffers stay as they are */
            int64_t *longs[] = {&s.codes_bytes,
                                &s.levels_count,
                                &s.pairs_count,
                                &s.rows,
                                &s.cols,
                                &s.vector_length,
                                &s.tile_rows,
                                &s.tile_cols,
                                &s.scales.bytes,
                                &s.scales.outer_rows,
                                &s.scales.outer_cols,
                                &s.scales.outer_bytes,
                                &s.offsets.bytes,
                                &z_count,
                                &y_count,
                                &batch,
                                &begin,
                                &end};
            int32_t *ints[] = {&s.bits,           &s.window,       &s.dimension,
                               &s.levels_per_row, &s.scales.dtype, &s.scales.outer_dtype};
            for (int64_t i = upto(2); i >= 0; i--) {
                if (upto(2)) {
                    int64_t *it = longs[upto(17)];
                    *it = upto(1) ? odd() : (int64_t)((uint64_t)*it + (uint64_t)upto(4) - 2);
                } else {
                    int32_t *it = ints[upto(5)];
                    *it = upto(1) ? (int32_t)odd() : (int32_t)((uint32_t)*it + (uint32_t)upto(4) - 2);
                }
            }
        }
        /* A wrong stage that happens to be consistent may claim more than the buffers hold: those are skipped. */
        const int claims = s.codes_bytes > right.codes_bytes || s.levels_count > right.levels_count ||
                           (s.pairs && s.pairs_count > right.pairs_count) || s.scales.bytes > right.scales.bytes ||
                           s.scales.outer_bytes > right.scales.outer_bytes || s.offsets.bytes > right.offsets.bytes ||
                           z_count > right.cols * 9 || y_count > right.rows * 9;
        float *z = floats(right.cols * 9), *first = NULL, *bound = NULL;
        const int32_t check = claims ? TQ_SHAPE : tq_check(&s);
        for (int32_t form = -1; form < 4 && !claims; form++) {
            float *y = calloc((size_t)(right.rows * 9 + 1), sizeof(float));
            const int32_t error = tq_product(&s, z, z_count, y, y_count, batch, begin, end, form);
            if (check && !error) fail("taken though tq_check refuses it", &s);
            if (form < 0 && !error) fail("no such form", &s);
            fast += tq_is_fast(&s, form);
            taken += !error;
            refused += !!error;
            if (!error && form == 0) {
                first = y;
                float *u = malloc((size_t)(s.rows * s.cols + 1) * sizeof(float));
                bound = calloc((size_t)(s.rows + 1), sizeof(float));
                if (tq_decode(&s, u, s.rows * s.cols, 0, s.rows, form)) fail("decode refuses what product takes", &s);
                for (int64_t i = 0; i < s.rows * s.cols; i++) bound[i / s.cols] += fabsf(u[i]);
                free(u);
            } else {
                for (int64_t i = 0; !error && i < y_count; i++)
                    if (!(fabsf(y[i] - first[i]) <= 0x1p-16f * bound[i % s.rows] + 0x1p-126f)) fail("forms differ", &s);
                free(y);
            }
            if (check || s.rows > 4096 || s.cols > 4096) continue;
            const int64_t a = upto(s.rows), b = a + upto(s.rows - a);
            float *u = malloc((size_t)((b - a) * s.cols + 1) * sizeof(float));
            float *v = malloc((size_t)(count * s.cols + 1) * sizeof(float));
            int64_t *index = malloc((size_t)(count + 1) * sizeof(int64_t));
            for (int64_t k = 0; k < count; k++) index[k] = upto(9) ? upto(s.rows) : odd();
            if (count && s.rows && upto(1)) index[0] = a < s.rows ? a : 0;
            tq_decode(&s, u, (b - a) * s.cols, a, b, form);
            const int32_t got = tq_rows(&s, v, count * s.cols, index, count, form);
            if (form >= 0 && !got && count && b > a && index[0] == a && memcmp(&u[0], &v[0], 4) && v[0] == v[0] &&
                u[0] != v[0])
                fail("a row and a range differ", &s);
            free(u);
            free(v);
            free(index);
        }
        if (!tq_check(&right) && right.rows * right.cols <= 4096) fuzz_weight(&right);
        if (turns % 4 == 0) fuzz_search();
        free(first);
        free(bound);
        free(z);
        free_moved(codes);
        free(levels);
        free((void *)right.pairs);
        free_moved(right.scales.data);
        free_moved(right.scales.outer);
        free_moved(right.offsets.data);
        free_moved(right.offsets.outer);
    }
    printf("%ld stages, %ld products taken (%ld by a vector path), %ld refused; %ld layers taken, %ld refused; %ld searches taken, "
           "%ld refused\n",
           turns, taken, fast, refused, linear_taken, linear_refused, searches, searches_refused);
    return taken && refused && fast && linear_taken && linear_refused && searches && searches_refused ? 0 : 1;
}
