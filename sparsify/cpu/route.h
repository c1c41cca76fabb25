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

/* The places of the k largest, the largest first, of equal ones the first. `best` [k] is scratch. */
static void take_largest(const float *values, int64_t count, int64_t k, float *best, int64_t *places) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        if (found == k && !(values[i] > best[k - 1])) continue;
        int64_t at = found < k ? found++ : k - 1;
        for (; at > 0 && values[i] > best[at - 1]; at--) best[at] = best[at - 1], places[at] = places[at - 1];
        best[at] = values[i], places[at] = i;
    }
}

static void route_rows(const route *r, int64_t first, int64_t rows, float *scratch) {
    float *hidden = scratch, *logits = hidden + rows * r->neurons, *best = logits + rows * r->experts;
    const float *x[TALL], *h[TALL];
    for (int64_t i = 0; i < rows; i++) x[i] = r->x + (first + i) * r->inner, h[i] = hidden + i * r->neurons;
    project(x, rows, &r->hidden, r->neurons, r->inner, hidden);
    for (int64_t i = 0; i < rows * r->neurons; i++) hidden[i] = hidden[i] < 0.0f ? 0.0f : hidden[i];
    project(h, rows, &r->output, r->experts, r->neurons, logits);
    for (int64_t i = 0; i < rows; i++)
        take_largest(logits + i * r->experts, r->experts, r->top_k, best, r->ids + (first + i) * r->top_k);
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
    r->scratch_of_thread = round_up(TALL * (r->neurons + r->experts) + r->top_k, VL);
    char *scratch = take(64 + threads * r->scratch_of_thread * 4); /* 64 for its size */
    if (!scratch) return NO_MEMORY;
    r->scratch = (float *)(scratch + 64);
    if (threads > 1) parallel(take_rows, r, (unsigned)threads, 0);
    else take_rows(r);
    give_back(scratch);
    return FINE;
}
