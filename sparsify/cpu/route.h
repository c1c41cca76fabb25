/* The experts of each token by a perceptron: the largest of output(relu(hidden(x))), in fp32, with weights in blocks. */

typedef struct {
    const float *x; /* [tokens][inner] */
    matrix hidden, output; /* of one expert each */
    int64_t tokens, inner, neurons, experts, top_k;
    int64_t *ids; /* [tokens][top_k], the largest first */
    float *scratch;
    int64_t scratch_of_thread, rows_of_task; /* rows_of_task <= TALL */
    int64_t tasks, next, arrived;
} route;

/* z [rows][outputs] = a w^T + bias, for rows <= TALL. */
static void project(const float *const *a, int64_t rows, const matrix *m, int64_t outputs, int64_t inner, float *z) {
    int64_t width = m->row / 4;
    for (int64_t n = 0, count; n < outputs; n += count) {
        count = least(least(OUTPUTS, width - n % width), outputs - n);
        sums s = plain_sums(z + n, outputs, bias_of(m, 0, n));
        product_outputs(a, rows, m, 0, n, count, inner, (turn){0, 1}, NULL, &s);
    }
}

/* Integers that are ordered as the values are, NaN at either end; -0 is 0. */
INLINE vu sort_keys(vf values) {
    vu bits = (vu)(values + splat(0.0f));
    return bits ^ ((vu)((vi)bits >> 31) | 0x80000000u);
}

static int64_t count_from(const uint32_t *keys, int64_t count, uint32_t least_key) {
    vi found = {0}; /* minus one for each */
    for (int64_t i = 0; i < count; i += VL) found += load(keys + i) >= (vu){0} + least_key;
    int64_t sum = 0;
    for (int i = 0; i < VL; i++) sum -= found[i];
    return sum;
}

/* The least key that k of them reach, or more where several are equal to the last: bit by bit. */
static uint32_t last_of_largest(const uint32_t *keys, int64_t count, int64_t k) {
    uint32_t last = 0;
    for (uint32_t bit = 0x80000000u; bit; bit /= 2) {
        int64_t found = count_from(keys, count, last | bit);
        if (found >= k) last |= bit;
        if (found == k) break;
    }
    return last;
}

/* The places of the k largest of `count` values, the largest first, of equal ones the first. `keys` [whole vectors] and
   `best` [k] are scratch. */
static void take_largest(const float *values, int64_t count, int64_t k, uint32_t *keys, uint64_t *best, int64_t *places) {
    for (int64_t i = 0; i < count; i += VL) {
        vu key = sort_keys((vf)load_words(values + i, least(count - i, VL)));
        memcpy(keys + i, &key, sizeof key);
    }
    for (int64_t i = count; i % VL; i++) keys[i] = 0;
    uint32_t last = last_of_largest(keys, count, k);
    int64_t found = 0, equal = k - (last < UINT32_MAX ? count_from(keys, count, last + 1) : 0);
    for (int64_t i = 0; i < count; i++) {
        if (keys[i] < last || (keys[i] == last && equal-- <= 0)) continue;
        uint64_t own = (uint64_t)keys[i] << 32 | (UINT32_MAX - (uint64_t)i);
        int64_t at = found++;
        for (; at > 0 && own > best[at - 1]; at--) best[at] = best[at - 1];
        best[at] = own;
    }
    for (int64_t i = 0; i < k; i++) places[i] = UINT32_MAX - (uint32_t)best[i];
}

static void route_rows(const route *r, int64_t first, int64_t rows, float *scratch) {
    uint64_t *best = (uint64_t *)scratch;
    uint32_t *keys = (uint32_t *)(best + r->top_k);
    float *hidden = (float *)keys + round_up(r->experts, VL), *logits = hidden + rows * r->neurons;
    const float *x[TALL], *h[TALL];
    for (int64_t i = 0; i < rows; i++) x[i] = r->x + (first + i) * r->inner, h[i] = hidden + i * r->neurons;
    project(x, rows, &r->hidden, r->neurons, r->inner, hidden);
    for (int64_t i = 0; i < rows * r->neurons; i++) hidden[i] = hidden[i] < 0.0f ? 0.0f : hidden[i];
    project(h, rows, &r->output, r->experts, r->neurons, logits);
    for (int64_t i = 0; i < rows; i++)
        take_largest(logits + i * r->experts, r->experts, r->top_k, keys, best, r->ids + (first + i) * r->top_k);
}

static void take_rows(void *data) {
    route *r = data;
    float *scratch = r->scratch + __atomic_fetch_add(&r->arrived, 1, __ATOMIC_RELAXED) * r->scratch_of_thread;
    for (int64_t task; (task = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED)) < r->tasks;) {
        int64_t first = task * r->rows_of_task;
        route_rows(r, first, least(r->rows_of_task, r->tokens - first), scratch);
    }
}

static int run_route(route *r, int64_t threads, parallel_function parallel) {
    if (!r->tokens || !r->top_k) return FINE;
    r->rows_of_task = parts_of(r->tokens, parts_of(r->tokens, TALL));
    r->tasks = parts_of(r->tokens, r->rows_of_task);
    threads = least(threads, r->tasks);
    r->scratch_of_thread = round_up(TALL * (r->neurons + r->experts) + round_up(r->experts, VL) + 2 * r->top_k, VL);
    char *scratch = take(64 + threads * r->scratch_of_thread * 4); /* 64 for its size */
    if (!scratch) return NO_MEMORY;
    r->scratch = (float *)(scratch + 64);
    if (threads > 1) parallel(take_rows, r, (unsigned)threads, 0);
    else take_rows(r);
    give_back(scratch);
    return FINE;
}
