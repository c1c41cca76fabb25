/* Gradients of sparsify::moe_ffn in fp32. Of pair p of token t and expert e, r_p its routing weight:

     z_p = x_t up[e]^T + b      h_p = act(z_p)      a_p = dy_t down[e]      dr_p = <a_p, h_p>      dz_p = r_p a_p act'(z_p)
     d_up[e] = sum_p dz_p^T x_t      d_down[e] = sum_p dy_t^T (r_p h_p)      dx_t = sum_p dz_p up[e]

   The bias of down is one neuron more, whose h is 1: it adds <dy_t, bias[e]> to dr_p, and its gradient is sum_p r_p dy_t.
   No neuron needs another one but in dr and dx. So a task is a slice of the neurons of an expert, with all its tokens;
   dr is left in parts, one a slice, and dx comes last, where a task is some tokens. One task computes a value, in an
   order that depends on the shapes only: the result is the same bits with any number of threads.

   These products read weights as blocks [inputs][outputs] (blocks.h). That is how down lies for a, and up for dx; for z a
   task transposes its slice of up, which then stays in the cache. Few neurons are read in rows: then it transposes down. */

typedef struct {
    job j;             /* up and gate in rows; down as the block that it is for dy, or by neuron, in rows of outputs */
    int64_t by_neuron; /* so is d_down */
    const char *dy;
    int64_t dy_row;
    float *d_x, *d_routing, *d_up, *d_up_bias, *d_gate, *d_gate_bias, *d_down, *d_down_bias; /* contiguous, NULL: not needed */
    float *dz, *d_gate_rows; /* [sorted position][width] */
    int64_t *ends, *largest_first;
    int64_t slices, slice, most_rows, tokens_of_task; /* slice: neurons */
    char *own; /* scratch memory of each thread */
    int64_t own_bytes, arrived, next;
} gradients;

#define OUTER_COLUMNS (OUTER_VECTORS * VL)

/* to[i] = sum over p of left[p][i] * right[p] from `first` on, rows by vectors, the last with `last` lanes. */
INLINE void outer_tile(const float *left, int64_t left_row, const float *const *right, int64_t count, int64_t first,
                       int rows, int vectors, int64_t last, float *to, int64_t to_row) {
    vf acc[OUTER_ROWS][OUTER_VECTORS];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int v = 0; v < vectors; v++) acc[i][v] = splat(0.0f);
    for (int64_t p = 0; p < count; p++, left += left_row) {
        vf row[OUTER_VECTORS];
        UNROLL
        for (int v = 0; v < vectors; v++)
            row[v] = (vf)load_words(right[p] + first + v * VL, v < vectors - 1 ? VL : last);
        UNROLL
        for (int i = 0; i < rows; i++) {
            vf value = splat(left[i]);
            UNROLL
            for (int v = 0; v < vectors; v++) acc[i][v] += value * row[v];
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int v = 0; v < vectors; v++)
            store_part(to + i * to_row + v * VL, acc[i][v], (v < vectors - 1 ? VL : last) * 4);
}

INLINE void outer_rows(const float *left, int64_t left_row, const float *const *right, int64_t count, int64_t first,
                       int rows, int64_t columns, float *to, int64_t to_row) {
    int64_t last = columns % VL ? columns % VL : VL;
    if (columns == OUTER_COLUMNS)
        outer_tile(left, left_row, right, count, first, rows, OUTER_VECTORS, VL, to, to_row);
    else if (columns > 2 * VL)
        outer_tile(left, left_row, right, count, first, rows, OUTER_VECTORS, last, to, to_row);
    else if (columns > VL)
        outer_tile(left, left_row, right, count, first, rows, 2, last, to, to_row);
    else
        outer_tile(left, left_row, right, count, first, rows, 1, last, to, to_row);
}

/* The same for any number of neurons and up to OUTER_COLUMNS columns. */
static void outer_columns(const float *left, int64_t left_row, int64_t neurons, const float *const *right,
                           int64_t count, int64_t first, int64_t columns, float *to, int64_t to_row) {
    int64_t n = 0;
    for (; n + OUTER_ROWS <= neurons; n += OUTER_ROWS)
        outer_rows(left + n, left_row, right, count, first, OUTER_ROWS, columns, to + n * to_row, to_row);
    for (; n + 4 <= neurons; n += 4)
        outer_rows(left + n, left_row, right, count, first, 4, columns, to + n * to_row, to_row);
    for (; n < neurons; n++)
        outer_rows(left + n, left_row, right, count, first, 1, columns, to + n * to_row, to_row);
}

/* `from` [rows][columns] to `to` [columns][rows]. */
static void transposed(const float *from, int64_t from_row, int64_t rows, int64_t columns, float *to, int64_t to_row) {
    for (int64_t n = 0; n < columns; n += VL)
        for (int64_t i = 0; i < rows; i += VL) {
            int64_t height = least(rows - i, VL), width = least(columns - n, VL);
            vf v[VL];
            for (int64_t r = 0; r < VL; r++)
                v[r] = r < height ? (vf)load_words(from + (i + r) * from_row + n, width) : splat(0.0f);
            transpose(v);
            for (int64_t c = 0; c < width; c++) store_part(to + (n + c) * to_row + i, v[c], height * 4);
        }
}

/* What a thread needs for one slice. Columns of many rows are copied: rows lie far apart, often in the same lines of the
   cache, and are read again for every OUTER_ROWS neurons. */
typedef struct {
    float *up, *gate;        /* [inner][neurons] */
    float *down;             /* [outputs][neurons], where that is not how it lies */
    float *routing;          /* [rows]: r */
    float *weighted;         /* [rows][neurons]: r h */
    float *block;            /* [neurons][OUTER_COLUMNS] */
    float *columns;          /* [rows][OUTER_COLUMNS] */
    const float **x, **dy, **copied;
} slice_memory;

/* Whether rows of x and dy meet weights in rows: to broadcast them would take a load for each of few products. */
static int meet_in_rows(int64_t neurons) {
    return neurons <= MOST_IN_ROWS && neurons % 4 == 0;
}

static slice_memory memory_of(const gradients *g, char *at) {
    int64_t weights = g->j.inner * g->slice * 4;
    slice_memory m = {.up = (float *)cut(&at, weights), .gate = (float *)cut(&at, g->j.gate.data ? weights : 0)};
    m.down = (float *)cut(&at, g->slices > 1 || g->by_neuron || meet_in_rows(g->slice) ? g->j.outputs * g->slice * 4 : 0);
    m.routing = (float *)cut(&at, g->most_rows * 4);
    m.weighted = (float *)cut(&at, g->most_rows * g->slice * 4);
    m.block = (float *)cut(&at, g->slice * OUTER_COLUMNS * 4);
    m.columns = (float *)cut(&at, g->slice > OUTER_ROWS ? g->most_rows * OUTER_COLUMNS * 4 : 0);
    m.x = (const float **)cut(&at, g->most_rows * 8);
    m.dy = (const float **)cut(&at, g->most_rows * 8);
    m.copied = (const float **)cut(&at, g->most_rows * 8);
    return m;
}

static int64_t bytes_of_memory(const gradients *g) {
    slice_memory m = memory_of(g, (char *)64); /* where its last part ends, from 64 on */
    return (int64_t)(intptr_t)m.copied + round_up(g->most_rows * 8, 64) - 64;
}

/* to [neurons][columns] = sum over the rows of left[p]^T * right[p], columns `first` to `first + columns`. */
static void outer_products(const slice_memory *m, const float *left, int64_t left_row, int64_t neurons,
                           const float *const *right, int64_t count, int64_t first, int64_t columns, float *to,
                           int64_t to_row) {
    if (neurons <= OUTER_ROWS) {
        outer_columns(left, left_row, neurons, right, count, first, columns, to, to_row);
        return;
    }
    for (int64_t p = 0; p < count; p++) {
        memcpy(m->columns + p * OUTER_COLUMNS, right[p] + first, (size_t)columns * 4);
        m->copied[p] = m->columns + p * OUTER_COLUMNS;
    }
    outer_columns(left, left_row, neurons, m->copied, count, 0, columns, to, to_row);
}

/* up or gate of a slice, as rows [neurons][inner] or, in `own`, as a block [inner][neurons]. */
static matrix projection_of_slice(const job *j, const matrix *m, int64_t e, int64_t first, int64_t neurons, float *own) {
    const char *rows = m->data + e * m->expert + first * m->row;
    if (meet_in_rows(neurons) || !m->data) return (matrix){.data = rows, .row = m->row};
    transposed((const float *)rows, m->row / 4, neurons, j->inner, own, neurons);
    return (matrix){.data = (const char *)own, .row = neurons * 4};
}

/* down of a slice, as rows [neurons][outputs] or as a block [outputs][neurons], copied where it is read for many rows. */
static matrix down_of_slice(const gradients *g, const slice_memory *m, int64_t e, int64_t first, int64_t neurons,
                            int64_t count) {
    const matrix *all = &g->j.down;
    int64_t outputs = g->j.outputs, in_rows = meet_in_rows(neurons), own_row = in_rows ? outputs : neurons;
    const char *from = all->data + e * all->expert + first * (g->by_neuron ? all->row : 4);
    matrix copy = {.data = (const char *)m->down, .row = own_row * 4}, lies = {.data = from, .row = all->row};
    if (in_rows == g->by_neuron && (in_rows || g->slices == 1 || count <= 2 * TALL)) return lies;
    if (g->by_neuron) transposed((const float *)from, all->row / 4, neurons, outputs, m->down, own_row);
    else if (in_rows) transposed((const float *)from, all->row / 4, outputs, neurons, m->down, own_row);
    else
        for (int64_t o = 0; o < outputs; o++)
            memcpy(m->down + o * own_row, from + o * all->row, (size_t)neurons * 4);
    return copy;
}

/* z [rows][neurons] = a w^T + bias, for rows <= TALL and what the two above return. */
static void slice_products(const float *const *a, int64_t rows, const matrix *w, int64_t neurons, int64_t inner,
                           turn now, const float *bias, float *z) {
    if (!meet_in_rows(neurons)) {
        sums into = plain_sums(z, neurons, bias);
        product_outputs(a, rows, w, 0, 0, neurons, inner, now, NULL, &into);
        return;
    }
    product_of_rows((const char *const *)a, rows, w->data, w->row, neurons, inner, bias, z, neurons);
}

static void scaled(const float *from, float factor, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i++) to[i] = from[i] * factor;
}

/* By vectors, as the compiler may not reorder a sum of numbers. */
static float dot(const float *a, const float *b, int64_t n) {
    vf sum = splat(0.0f);
    for (int64_t i = 0; i < n; i += VL)
        sum += (vf)load_words(a + i, least(n - i, VL)) * (vf)load_words(b + i, least(n - i, VL));
    return sum_lanes(sum, splat(0.0f), splat(0.0f), splat(0.0f))[0];
}

/* dz (and the same of the gate) and r h of all rows; the parts of dr. */
static void rows_backward(gradients *g, const slice_memory *m, int64_t e, int64_t start, int64_t count, int64_t first,
                          int64_t neurons) {
    const job *j = &g->j;
    float z[TALL * OUTPUTS] = {0}, gate[TALL * OUTPUTS] = {0}, d[TALL * OUTPUTS] = {0}, unscaled[TALL * OUTPUTS];
    matrix up = projection_of_slice(j, &j->up, e, first, neurons, m->up);
    matrix gated = projection_of_slice(j, &j->gate, e, first, neurons, m->gate);
    matrix down = down_of_slice(g, m, e, first, neurons, count);
    const float *bias = bias_of(&j->up, e, first), *gate_bias = bias_of(&j->gate, e, first);
    turn now = {0, parts_of(count, TALL)};
    for (int64_t done = 0, rows; done < count; done += rows, now.number++) {
        rows = rows_of_turn(now, count - done);
        slice_products(m->x + done, rows, &up, neurons, j->inner, now, bias, z);
        if (j->gate.data) slice_products(m->x + done, rows, &gated, neurons, j->inner, now, gate_bias, gate);
        slice_products(m->dy + done, rows, &down, neurons, j->outputs, now, NULL, d);
        if (g->d_routing) memcpy(unscaled, d, sizeof d);
        activate_backward(z, j->gate.data ? gate : NULL, d, rows * neurons, (int)j->activation);
        for (int64_t i = 0; i < rows; i++) {
            int64_t pair = j->order[start + done + i], at = (start + done + i) * j->width + first, own = i * neurons;
            float weight = m->routing[done + i];
            scaled(d + own, weight, neurons, g->dz + at);
            scaled(z + own, weight, neurons, m->weighted + (done + i) * neurons);
            if (j->gate.data) scaled(gate + own, weight, neurons, g->d_gate_rows + at);
            if (g->d_routing)
                g->d_routing[first / g->slice * j->tokens * j->slots + pair] = dot(unscaled + own, z + own, neurons);
        }
    }
}

static void projection_backward(const gradients *g, const slice_memory *m, const float *d_rows, int64_t count,
                                int64_t neurons, float *d_weight, float *d_bias) {
    int64_t width = g->j.width, inner = g->j.inner;
    for (int64_t c = 0; d_weight && c < inner; c += OUTER_COLUMNS)
        outer_products(m, d_rows, width, neurons, m->x, count, c, least(inner - c, OUTER_COLUMNS), d_weight + c, inner);
    if (!d_bias) return;
    memset(d_bias, 0, (size_t)neurons * 4);
    for (int64_t p = 0; p < count; p++)
        for (int64_t n = 0; n < neurons; n++) d_bias[n] += d_rows[p * width + n];
}

/* What the bias of down adds to dr, in the part of the first slice, and its gradient. */
static void bias_backward(const gradients *g, const slice_memory *m, int64_t e, int64_t start, int64_t count) {
    const float *bias = bias_of(&g->j.down, e, 0);
    int64_t outputs = g->j.outputs;
    for (int64_t p = 0; g->d_routing && bias && p < count; p++)
        g->d_routing[g->j.order[start + p]] += dot(m->dy[p], bias, outputs);
    for (int64_t c = 0; g->d_down_bias && c < outputs; c += OUTER_COLUMNS)
        outer_products(m, m->routing, 1, 1, m->dy, count, c, least(outputs - c, OUTER_COLUMNS),
                       g->d_down_bias + e * outputs + c, outputs);
}

static void slice_backward(gradients *g, int64_t task, char *own) {
    const job *j = &g->j;
    int64_t e = g->largest_first[task / g->slices], first = task % g->slices * g->slice;
    int64_t neurons = least(j->width - first, g->slice), start = e ? g->ends[e - 1] : 0, count = g->ends[e] - start;
    int64_t neuron = e * j->width + first; /* of all */
    slice_memory m = memory_of(g, own);
    for (int64_t p = 0; p < count; p++) {
        m.x[p] = (const float *)x_of(j, start + p);
        m.dy[p] = (const float *)(g->dy + j->order[start + p] / j->slots * g->dy_row);
        m.routing[p] = weight_of(j, j->order[start + p]);
    }
    if (count) rows_backward(g, &m, e, start, count, first, neurons);
    if (!first) bias_backward(g, &m, e, start, count);
    int64_t at = start * j->width + first;
    projection_backward(g, &m, g->dz + at, count, neurons, g->d_up ? g->d_up + neuron * j->inner : NULL,
                        g->d_up_bias ? g->d_up_bias + neuron : NULL);
    if (j->gate.data)
        projection_backward(g, &m, g->d_gate_rows + at, count, neurons,
                            g->d_gate ? g->d_gate + neuron * j->inner : NULL,
                            g->d_gate_bias ? g->d_gate_bias + neuron : NULL);
    for (int64_t c = 0; g->d_down && c < j->outputs; c += OUTER_COLUMNS) {
        int64_t columns = least(j->outputs - c, OUTER_COLUMNS);
        if (g->by_neuron) {
            float *to = g->d_down + neuron * j->outputs + c;
            outer_products(&m, m.weighted, neurons, neurons, m.dy, count, c, columns, to, j->outputs);
            continue;
        }
        outer_products(&m, m.weighted, neurons, neurons, m.dy, count, c, columns, m.block, OUTER_COLUMNS);
        transposed(m.block, OUTER_COLUMNS, neurons, columns, g->d_down + (e * j->outputs + c) * j->width + first, j->width);
    }
}

static void take_slices(void *data) {
    gradients *g = data;
    char *own = g->own + __atomic_fetch_add(&g->arrived, 1, __ATOMIC_RELAXED) * g->own_bytes;
    for (int64_t task; (task = __atomic_fetch_add(&g->next, 1, __ATOMIC_RELAXED)) < g->j.experts * g->slices;)
        slice_backward(g, task, own);
}

/* The first sorted position of [from, to) whose pair is not below `pair`; those of an expert ascend. */
static int64_t position_of(const job *j, int64_t from, int64_t to, int64_t pair) {
    while (from < to) {
        int64_t middle = (from + to) / 2;
        if (j->order[middle] < pair) from = middle + 1;
        else to = middle;
    }
    return from;
}

/* dx of the tokens of some pairs of an expert with FEW_INPUTS neurons. */
static void add_few(const job *j, const segment *s) {
    int64_t places[MOST_TOKENS];
    passing r = {.hidden_row = j->width, .places = places, .z = (float *)j->y, .z_row = j->outputs};
    for (int64_t done = 0; done < s->rows; done += r.rows) {
        r.rows = least(s->rows - done, MOST_TOKENS);
        r.hidden = (const float *)j->hidden_rows + (s->row + done) * j->width;
        for (int64_t p = 0; p < r.rows; p++) places[p] = j->order[s->first + done + p] / j->slots;
        pass_block(&r, (const float *)(j->down.data + s->expert * j->down.expert), j->down.row / 4, NULL, j->outputs, NULL);
    }
}

/* dx of some tokens, by the product of `down` with other names. */
static void add_to_x(const gradients *g, const matrix *weights, const float *d_rows, int64_t first, int64_t last) {
    job j = g->j;
    j.down = *weights, j.down.bias = NULL;
    j.y = (char *)g->d_x, j.outputs = j.inner, j.by_tokens = 1, j.in_blocks = 1, j.takers = 1;
    j.hidden_rows = (char *)d_rows, j.hidden_row = j.width * 4;
    for (int64_t e = 0; e < j.experts; e++) {
        int64_t from = position_of(&j, e ? g->ends[e - 1] : 0, g->ends[e], first * j.slots);
        segment s = {.expert = e, .first = from, .row = from};
        s.rows = position_of(&j, from, g->ends[e], last * j.slots) - from;
        if (s.rows && j.width == FEW_INPUTS) add_few(&j, &s);
        else if (s.rows) down_block(&j, &s, 0);
    }
}

static void take_rows_of_x(void *data) {
    gradients *g = data;
    int64_t tokens = g->j.tokens, step = g->tokens_of_task;
    for (int64_t first; (first = __atomic_fetch_add(&g->next, 1, __ATOMIC_RELAXED) * step) < tokens;) {
        int64_t last = least(first + step, tokens);
        memset(g->d_x + first * g->j.inner, 0, (size_t)((last - first) * g->j.inner) * 4);
        add_to_x(g, &g->j.up, g->dz, first, last);
        if (g->j.gate.data) add_to_x(g, &g->j.gate, g->d_gate_rows, first, last);
    }
}

static void in_threads(void (*run)(void *), gradients *g, int64_t threads, parallel_function parallel) {
    g->next = 0;
    if (threads > 1) parallel(run, g, (unsigned)threads, 0);
    else run(g);
}

static int by_size(const void *a, const void *b) {
    int64_t left = *(const int64_t *)a, right = *(const int64_t *)b;
    return (left < right) - (left > right);
}

/* The sorted pairs, and the experts by falling number of them. */
static int plan_backward(gradients *g) {
    job *j = &g->j;
    int status = sort_pairs(j, 0, j->tokens, g->ends);
    if (status != FINE) return status;
    for (int64_t e = 0; e < j->experts; e++) {
        int64_t count = g->ends[e] - (e ? g->ends[e - 1] : 0);
        if (g->most_rows < count) g->most_rows = count;
        g->largest_first[e] = count * j->experts + e;
    }
    qsort(g->largest_first, (size_t)j->experts, sizeof *g->largest_first, by_size);
    for (int64_t e = 0; e < j->experts; e++) g->largest_first[e] %= j->experts;
    return FINE;
}

static int run_backward(gradients *g, int64_t threads, int64_t poison, parallel_function parallel) {
    job *j = &g->j;
    int64_t pairs = j->tokens * j->slots, rows_bytes = pairs * j->width * 4;
    char *lists = malloc((size_t)(round_up(pairs * 8, 64) + 2 * round_up((j->experts + 1) * 8, 64))), *at = lists;
    if (!lists) return NO_MEMORY;
    j->order = (int64_t *)cut(&at, pairs * 8);
    g->ends = (int64_t *)cut(&at, (j->experts + 1) * 8);
    g->largest_first = (int64_t *)cut(&at, (j->experts + 1) * 8);
    g->slices = parts_of(j->width, OUTPUTS);
    g->slice = parts_of(j->width, g->slices);
    g->tokens_of_task = least(parts_of(j->tokens, threads), MOST_TOKENS);
    int status = plan_backward(g);
    g->own_bytes = bytes_of_memory(g);
    int64_t bytes = round_up(rows_bytes, 64) * (j->gate.data ? 2 : 1) + threads * g->own_bytes + 64; /* 64 for its size */
    char *scratch = status == FINE ? take(bytes) : NULL;
    if (status == FINE && !scratch) status = NO_MEMORY;
    if (status == FINE) {
        at = scratch + 64;
        if (poison) memset(at, 0xff, (size_t)bytes - 64);
        g->dz = (float *)cut(&at, rows_bytes);
        if (j->gate.data) g->d_gate_rows = (float *)cut(&at, rows_bytes);
        g->own = at;
        in_threads(take_slices, g, threads, parallel);
        if (g->d_x) in_threads(take_rows_of_x, g, threads, parallel);
    }
    give_back(scratch);
    free(lists);
    return status;
}

/* `a` is what sparsify/cpu/kernel_backward.py packs, in the same order, as in sparsify_moe_ffn. */
int sparsify_moe_ffn_backward(const int64_t *a) {
    gradients g = {
        .j = {
            .x = (const char *)(intptr_t)a[0],
            .x_row = a[1],
            .routing = (const float *)(intptr_t)a[2],
            .ids = (const int64_t *)(intptr_t)a[3],
            .tokens = a[6],
            .inner = a[7],
            .width = a[8],
            .outputs = a[9],
            .experts = a[10],
            .slots = a[11],
            .activation = a[12],
            .up = matrix_at(a + 16),
            .gate = matrix_at(a + 21),
            .down = matrix_at(a + 26),
        },
        .dy = (const char *)(intptr_t)a[4],
        .dy_row = a[5],
        .d_x = (float *)(intptr_t)a[31],
        .d_routing = (float *)(intptr_t)a[32],
        .d_up = (float *)(intptr_t)a[33],
        .d_up_bias = (float *)(intptr_t)a[34],
        .d_gate = (float *)(intptr_t)a[35],
        .d_gate_bias = (float *)(intptr_t)a[36],
        .d_down = (float *)(intptr_t)a[37],
        .d_down_bias = (float *)(intptr_t)a[38],
        .by_neuron = a[39],
    };
    return run_backward(&g, a[13], a[14], (parallel_function)(intptr_t)a[15]);
}
