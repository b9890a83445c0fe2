/* Checks, the choice of a form, and the functions of tqformat_kernels.h. */
#include <stdatomic.h>

#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

static const int64_t SCALARS = (int64_t)1 << 53;

#if defined(__x86_64__)
/* Bit 29 of ecx: not every compiler's __builtin_cpu_supports knows the name. Asked once: in a virtual machine the
 * instruction takes microseconds. */
static int has_f16c(void) {
    static atomic_int known; /* 0: not yet, 1: no, 2: yes */
    int has = atomic_load_explicit(&known, memory_order_relaxed);
    unsigned a, b, c, d;
    if (!has) atomic_store(&known, has = 1 + (__get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1)));
    return has == 2;
}

static int can_run_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
           has_f16c();
}

/* The form for AVX-512 wants VBMI and VNNI as well: Ice Lake, Zen 4 and later. What is older takes AVX2. */
static int can_run_avx512(void) {
    return can_run_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
static int can_run_neon(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & (1 << 1)) != 0; /* HWCAP_ASIMD */
#else
    return 1; /* part of the architecture on the other systems */
#endif
}
#endif

static const tq_form *get_form(int32_t i) {
    switch (i) {
        case 0: return &tq_form_portable;
#if defined(__x86_64__)
        case 1: return can_run_avx2() ? &tq_form_avx2 : NULL;
        case 2: return can_run_avx512() ? &tq_form_avx512 : NULL;
#elif defined(__aarch64__)
        case 1: return can_run_neon() ? &tq_form_neon : NULL;
#endif
        default: return NULL;
    }
}

int32_t tq_abi(void) { return TQ_ABI; }

const char *tq_form_name(int32_t i) {
    const tq_form *form = get_form(i);
    return form ? form->name : NULL;
}

static int size_of(int32_t dtype) { return dtype == TQ_F32 ? 4 : dtype == TQ_F16 || dtype == TQ_BF16 ? 2 : 1; }

static int factors_fit(const tq_factors *f, int64_t rows, int64_t n) {
    if (f->dtype < 0 || f->dtype >= TQ_DTYPES || f->bytes != rows * n * size_of(f->dtype)) return 0;
    if (!f->outer) return 1;
    return f->outer_dtype >= TQ_F32 && f->outer_dtype <= TQ_BF16 && (f->outer_rows == 1 || f->outer_rows == rows) &&
           f->outer_cols >= 1 && f->outer_cols <= n && n % f->outer_cols == 0 &&
           f->outer_bytes == f->outer_rows * f->outer_cols * size_of(f->outer_dtype);
}

/* [TQ-CODE-1, TQ-CODE-2, TQ-CODE-4, TQ-BOOK-3, TQ-NUM-1, TQ-NUM-8]; no product below can exceed 2^53 * 2^6. */
int32_t tq_check(const tq_stage *s) {
    if (!s || s->dimension < 1 || s->dimension > 64 || s->bits < 1 || s->bits > 16 || s->bits > 8 * s->dimension ||
        s->window < s->bits || s->window > 16)
        return TQ_SHAPE;
    if (s->cols < 1 || s->cols > 1 << 20 || s->rows < 0 || s->rows > SCALARS / s->cols) return TQ_SHAPE;
    if (s->tile_rows < 1 || s->tile_rows > (1 << 22) / s->cols || s->rows % s->tile_rows || s->tile_cols < 1 ||
        s->tile_cols > s->cols || s->cols % s->tile_cols || s->tile_cols % s->dimension)
        return TQ_SHAPE;
    if (s->vector_length < 1 || s->vector_length > s->cols || s->cols % s->vector_length ||
        s->vector_length % s->dimension)
        return TQ_SHAPE;
    if (tq_tile_bits(s) < s->window) return TQ_SHAPE;
    int64_t tiles = s->rows / s->tile_rows * (s->cols / s->tile_cols), vectors = s->cols / s->vector_length;
    if (s->codes_bytes != tiles * tq_tile_bytes(s)) return TQ_SHAPE;
    int64_t book = ((int64_t)1 << s->window) * s->dimension;
    if (s->levels_per_row != 0 && s->levels_per_row != 1) return TQ_SHAPE;
    if (s->levels_count < 0 || s->levels_count % book || s->levels_count / book != (s->levels_per_row ? s->rows : 1))
        return TQ_SHAPE;
    if (!(s->computed >= 0 && s->computed <= 1) ||
        ((s->computed > 0 || s->pairs) && (s->dimension > 1 || s->levels_per_row)))
        return TQ_SHAPE;
    if (s->pairs && s->pairs_count != (int64_t)2 << (s->window + s->bits)) return TQ_SHAPE;
    if (!factors_fit(&s->scales, s->rows, vectors) || (s->offsets.data && !factors_fit(&s->offsets, s->rows, vectors)))
        return TQ_SHAPE;
    return s->rows && (!s->codes || !s->levels || !s->scales.data) ? TQ_SHAPE : TQ_OK;
}

int32_t tq_is_fast(const tq_stage *s, int32_t i) {
    const tq_form *form = get_form(i);
    return form && tq_check(s) == TQ_OK && form->is_fast(s);
}

static int is_range(const tq_stage *s, int64_t begin, int64_t end) {
    return 0 <= begin && begin <= end && end <= s->rows;
}

int32_t tq_product(const tq_stage *s, const float *z, int64_t z_count, float *y, int64_t y_count, int64_t batch,
                   int64_t begin, int64_t end, int32_t i) {
    const tq_form *form = get_form(i);
    int32_t error = form ? tq_check(s) : TQ_RANGE;
    if (error) return error;
    if (!is_range(s, begin, end) || begin % s->tile_rows || end % s->tile_rows) return TQ_RANGE;
    if (batch < 0 || batch > SCALARS / s->cols || (s->rows && batch > SCALARS / s->rows)) return TQ_RANGE;
    if (z_count != batch * s->cols || y_count != batch * s->rows || (batch && (!z || (s->rows && !y)))) return TQ_SHAPE;
    if (begin == end) return TQ_OK;
    for (int64_t b = 0; b < batch && !error; b += TQ_MAX_BATCH) {
        int64_t n = batch - b < TQ_MAX_BATCH ? batch - b : TQ_MAX_BATCH;
        error = form->product(s, z + b * s->cols, y + b * s->rows, n, begin, end);
    }
    return error;
}

/* What the threads of tq_product_parallel share. */
typedef struct {
    const tq_stage *stage;
    const float *z;
    float *y;
    int64_t z_count, y_count, batch, begin, end, step, parts;
    int32_t form;
    atomic_int_least64_t next;
    atomic_int error;
} team;

static void work(void *data) {
    team *t = (team *)data;
    for (int64_t i; (i = atomic_fetch_add(&t->next, 1)) < t->parts;) {
        const int64_t steps = (t->end - t->begin) / t->step;
        const int64_t begin = t->begin + steps * i / t->parts * t->step,
                      end = t->begin + steps * (i + 1) / t->parts * t->step;
        const int32_t error = tq_product(t->stage, t->z, t->z_count, t->y, t->y_count, t->batch, begin, end, t->form);
        if (error) atomic_store(&t->error, error);
    }
}

int32_t tq_product_parallel(const tq_stage *s, const float *z, int64_t z_count, float *y, int64_t y_count,
                            int64_t batch, int64_t begin, int64_t end, int32_t i, int32_t threads,
                            tq_parallel parallel) {
    const int32_t error = tq_check(s);
    if (error) return error;
    if (threads < 1 || !parallel || !is_range(s, begin, end) || begin % s->tile_rows || end % s->tile_rows)
        return TQ_RANGE;
    /* Two parts a thread: one that the system holds up leaves the rest to the others. */
    team t = {s, z, y, z_count, y_count, batch, begin, end, s->tile_rows, 2 * (int64_t)threads, i, 0, TQ_OK};
    const int64_t steps = (end - begin) / s->tile_rows;
    if (t.parts > steps) t.parts = steps > 0 ? steps : 1;
    parallel(work, &t, (unsigned)threads, 0);
    work(&t); /* parts that no thread took, or the caller would get what stood in y before */
    return atomic_load(&t.error);
}

static int is_float(int32_t dtype) { return dtype >= TQ_F32 && dtype <= TQ_BF16; }

static int transform_fits(const tq_transform *t, int64_t cols) {
    int64_t size = 1, floats = 0;
    if (t->size < 1 || t->size > cols || cols % t->size || t->count < 0 || !t->signs || (t->count && !t->factors))
        return 0;
    for (int32_t k = 0; k < t->count; k++) {
        const int64_t f = t->factors[k];
        if (f < 2 || f > t->size / size) return 0;
        size *= f;
        floats += f * ((f + TQ_ROOM - 1) / TQ_ROOM * TQ_ROOM);
    }
    return size == t->size && floats == t->matrices_count && (t->count == 0 || t->matrices);
}

int32_t tq_check_weight(const tq_weight *w) {
    if (!w || w->count < 1 || !w->stages || !w->transforms) return TQ_SHAPE;
    for (int32_t k = 0; k < w->count; k++) {
        const tq_stage *s = w->stages[k];
        if (tq_check(s) || s->rows != w->stages[0]->rows || s->cols != w->stages[0]->cols) return TQ_SHAPE;
        if (w->transforms[k] && !transform_fits(w->transforms[k], s->cols)) return TQ_SHAPE;
    }
    if (w->column_scale && (!is_float(w->column_scale_dtype) ||
                            w->column_scale_bytes != w->stages[0]->cols * size_of(w->column_scale_dtype)))
        return TQ_SHAPE;
    return TQ_OK;
}

/* z = T(x), block by block; scratch has twice the size of a block and TQ_ROOM, z has TQ_ROOM behind its end. */
static void rotate(const tq_transform *t, const tq_form *form, const float *x, int64_t n, float *scratch, float *z) {
    float *other = scratch + t->size + TQ_ROOM;
    for (int64_t at = 0; at < n; at += t->size) {
        float *from = scratch, *to = other;
        const float *h = t->matrices;
        for (int64_t i = 0; i < t->size; i++) from[i] = x[at + i] * t->signs[i];
        for (int32_t k = 0; k < t->count; k++) {
            const int64_t f = t->factors[k];
            form->rotate(h, f, from, t->size / f, k + 1 < t->count ? to : z + at);
            h += f * ((f + TQ_ROOM - 1) / TQ_ROOM * TQ_ROOM);
            float *last = from;
            from = to;
            to = last;
        }
        if (!t->count) memcpy(z + at, from, (size_t)t->size * sizeof(float));
    }
}

static void store(const float *from, int64_t n, void *to, int32_t dtype) {
    uint16_t *halves = (uint16_t *)to;
    if (dtype == TQ_F32) memcpy(to, from, (size_t)n * sizeof(float));
    else if (dtype == TQ_F16)
        for (int64_t i = 0; i < n; i++) halves[i] = tq_to_half(from[i]);
    else
        for (int64_t i = 0; i < n; i++) halves[i] = tq_to_bf16(from[i]);
}

int32_t tq_linear(const tq_weight *w, const void *x, int32_t x_dtype, int64_t x_count, void *y, int32_t y_dtype,
                  int64_t y_count, int64_t batch, int32_t i, int32_t threads, tq_parallel parallel) {
    const tq_form *form = get_form(i);
    int32_t error = form ? tq_check_weight(w) : TQ_RANGE;
    if (error) return error;
    const int64_t rows = w->stages[0]->rows, cols = w->stages[0]->cols;
    if (batch < 0 || batch > SCALARS / cols || (rows && batch > SCALARS / rows) || threads < 1) return TQ_RANGE;
    if (!is_float(x_dtype) || !is_float(y_dtype) || x_count != batch * cols || y_count != batch * rows) return TQ_SHAPE;
    if (batch == 0 || rows == 0) return TQ_OK;
    if (!x || !y) return TQ_SHAPE;
    /* x and z with room behind them, one block twice, the sum, and the product of a stage that is added to it */
    const int64_t in = batch * cols + TQ_ROOM, out = batch * rows;
    float *v = tq_alloc((size_t)(2 * in + 2 * (cols + TQ_ROOM) + (w->count > 1 ? 2 : 1) * out) * sizeof(float));
    if (!v) return TQ_MEMORY;
    float *turned = v + in, *scratch = turned + in, *total = scratch + 2 * (cols + TQ_ROOM);
    tq_floats(x, x_dtype, 0, batch * cols, v);
    if (w->column_scale) {
        tq_floats(w->column_scale, w->column_scale_dtype, 0, cols, scratch);
        for (int64_t b = 0; b < batch; b++)
            for (int64_t c = 0; c < cols; c++) v[b * cols + c] *= scratch[c];
    }
    for (int32_t k = 0; k < w->count && !error; k++) {
        const tq_stage *s = w->stages[k];
        const tq_transform *t = w->transforms[k];
        const float *z = t ? turned : v;
        float *to = k ? total + out : total;
        if (t && (k == 0 || t != w->transforms[k - 1])) rotate(t, form, v, batch * cols, scratch, turned);
        if (parallel && threads > 1)
            error = tq_product_parallel(s, z, batch * cols, to, out, batch, 0, rows, i, threads, parallel);
        else error = tq_product(s, z, batch * cols, to, out, batch, 0, rows, i);
        for (int64_t e = 0; k && e < out; e++) total[e] += to[e];
    }
    if (!error) store(total, out, y, y_dtype);
    free(v);
    return error;
}

int32_t tq_decode(const tq_stage *s, float *out, int64_t out_count, int64_t begin, int64_t end, int32_t i) {
    const tq_form *form = get_form(i);
    int32_t error = form ? tq_check(s) : TQ_RANGE;
    if (error) return error;
    if (!is_range(s, begin, end)) return TQ_RANGE;
    if (out_count != (end - begin) * s->cols || (begin < end && !out)) return TQ_SHAPE;
    return begin < end ? form->decode(s, out, begin, end) : TQ_OK;
}

int32_t tq_rows(const tq_stage *s, float *out, int64_t out_count, const int64_t *index, int64_t count, int32_t i) {
    const tq_form *form = get_form(i);
    int32_t error = form ? tq_check(s) : TQ_RANGE;
    if (error) return error;
    if (count < 0 || count > SCALARS / s->cols) return TQ_RANGE;
    if (out_count != count * s->cols || (count && (!out || !index))) return TQ_SHAPE;
    for (int64_t k = 0; k < count; k++)
        if (index[k] < 0 || index[k] >= s->rows) return TQ_RANGE;
    for (int64_t k = 0; k < count && !error; k++) error = form->row(s, out + k * s->cols, index[k]);
    return error;
}

int32_t tq_encode(const tq_search *s, int32_t i) {
    const tq_form *form = get_form(i);
    if (!form) return TQ_RANGE;
    if (!s || s->bits < 1 || s->bits > 8 || s->window < s->bits + 4 || s->window > 16) return TQ_SHAPE;
    if (s->rows < 1 || s->rows > 1 << 22 || s->cols < 0 || s->cols > 1 << 28 || s->rows * s->bits < s->window)
        return TQ_SHAPE;
    if (s->groups < 1 || s->cols % s->groups || s->overlap < 1 || s->overlap > 1 << 16) return TQ_SHAPE;
    if (s->cols == 0) return TQ_OK;
    if (!s->targets || !s->scales || !s->roots || !s->levels || !s->symbols) return TQ_SHAPE;
    return form->search(s);
}
