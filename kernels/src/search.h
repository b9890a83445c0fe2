/* The codes of a trellis nearest to given values, with error feedback: what a quantizer does most of its time. Included
 * by each form behind its vectors, with
 *
 *   v_choose(other, j, &best, &branch)   lanes where other < best take it, and j
 *   v_store_bytes(p, a)                  the lowest byte of each lane
 *
 * A symbol is a window of `window` bits that moves on by `bits`. Neighbours share window - bits bits, their state: there
 * are S = 2^(window - bits) states, and J = 2^bits branches into each. The window of branch j into state s is s J + j,
 * and comes from state (s J + j) mod S. The best paths of VL states are extended side by side: `book` has the levels as
 * [S / VL, J, VL], `cost` those of the states before, [J, width], which repeats after S / J of them.
 */
#define FAR 1e37f /* the cost of a state where no path may start */

typedef struct {
    const float *book;
    float *total, *cost; /* [S] and [J, width] */
    uint8_t *back;       /* [steps, S]: the best branch into each state after each step */
    int64_t states, width;
    int branches;
} trellis;

/* One step: the costs of the best paths to a value x, in units of root. J is a constant where it is inlined. */
static inline __attribute__((always_inline)) void step(int J, const trellis *t, float x, float root, uint8_t *back) {
    const int64_t states = t->states, width = t->width, period = states / J > 0 ? states / J : 1;
    const float *restrict from = t->total;
    float *restrict to = t->cost;
    if (period == width)
        for (int64_t i = 0; i < width; i++)
            for (int j = 0; j < J; j++) to[j * width + i] = from[i * J + j];
    else
        for (int j = 0; j < J; j++)
            for (int64_t i = 0; i < width; i++) to[j * width + i] = from[(i * J + j) & (states - 1)];
    const vf target = v_set(x), unit = v_set(-root);
    const float *level = t->book;
    for (int64_t s = 0; s < states; s += VL, level += J * VL) {
        const float *cost = t->cost + (s & (width - 1));
        vf d = v_fma(unit, v_load(level), target), best = v_fma(d, d, v_load(cost));
        vi branch = vi_set(0);
        for (int j = 1; j < J; j++) {
            d = v_fma(unit, v_load(level + j * VL), target);
            v_choose(v_fma(d, d, v_load(cost + j * width)), vi_set((uint32_t)j), &best, &branch);
        }
        v_store(t->total + s, best);
        v_store_bytes(back + s, branch);
    }
}

/* The best paths over values first to first + steps - 1 (mod n), from state `start`, or from anywhere if that is < 0. */
static void extend(const trellis *t, const float *x, const float *root, int64_t n, int64_t first, int64_t steps,
                   int64_t start) {
    for (int64_t s = 0; s < t->states; s++) t->total[s] = start < 0 || s == start ? 0 : FAR;
    for (int64_t k = 0, i = first; k < steps; k++, i = i + 1 < n ? i + 1 : 0) {
        uint8_t *back = t->back + k * t->states;
        switch (t->branches) {
            case 2: step(2, t, x[i], root[i], back); break;
            case 4: step(4, t, x[i], root[i], back); break;
            case 8: step(8, t, x[i], root[i], back); break;
            case 16: step(16, t, x[i], root[i], back); break;
            default: step(t->branches, t, x[i], root[i], back);
        }
    }
}

/* The state before step `stop` of the path that ends in `state` after `steps`; its symbols, where they are wanted. */
static int64_t trace(const trellis *t, int64_t steps, int64_t stop, int64_t state, uint16_t *symbols) {
    for (int64_t k = steps - 1; k >= stop; k--) {
        const int64_t symbol = state * t->branches + t->back[k * t->states + state];
        if (symbols) symbols[k] = (uint16_t)symbol;
        state = symbol & (t->states - 1);
    }
    return state;
}

static int form_search(const tq_search *s) {
    const int64_t n = s->rows, states = (int64_t)1 << (s->window - s->bits), branches = (int64_t)1 << s->bits;
    const int64_t width = states / branches > VL ? states / branches : VL, all = (int64_t)1 << s->window;
    const int64_t around = 2 * s->overlap, steps = n > around ? n : around;
    const int64_t floats = all + states + branches * width + 3 * n;
    float *book = tq_alloc((size_t)floats * sizeof(float) + (size_t)(steps * states));
    if (!book) return TQ_MEMORY;
    float *total = book + all, *cost = total + states, *x = cost + branches * width, *root = x + n, *error = root + n;
    const trellis t = {book, total, cost, (uint8_t *)(error + n), states, width, (int)branches};
    for (int64_t i = 0; i < states; i++)
        for (int64_t j = 0; j < branches; j++)
            book[(i / VL * branches + j) * VL + i % VL] = s->levels[i * branches + j];
    for (int64_t c = 0; c < s->cols; c++) {
        const int64_t group = c / (s->cols / s->groups);
        const float *scale = s->scales + group * n, *weight = s->roots + group * n;
        float *target = s->targets + c * n;
        uint16_t *symbols = s->symbols + c * n;
        for (int64_t k = 0; k < n; k++) {
            root[k] = weight[k];
            x[k] = scale[k] > 0 ? target[k] / scale[k] * weight[k] : 0;
        }
        /* First around the tile's begin, for the state that the best path has there; then from it to itself. */
        extend(&t, x, root, n, n - 1 - (s->overlap - 1) % n, around, -1);
        int64_t start = 0;
        for (int64_t k = 1; k < states; k++)
            if (total[k] < total[start]) start = k;
        start = trace(&t, around, s->overlap, start, NULL);
        extend(&t, x, root, n, 0, n, start);
        trace(&t, n, 0, start, symbols);
        if (!s->upper) continue;
        const float *row = s->upper + c * s->cols, pivot = 1 / row[c];
        for (int64_t k = 0; k < n; k++) error[k] = (target[k] - s->levels[symbols[k]] * scale[k]) * pivot;
        for (int64_t j = c + 1; j < s->cols; j++) {
            const float factor = row[j];
            float *next = s->targets + j * n;
            for (int64_t k = 0; k < n; k++) next[k] -= factor * error[k];
        }
    }
    free(book);
    return TQ_OK;
}
