/* The phases up and down with weights in blocks [inner][outputs of a block], in fp32: a lane is an output, the elements
   of a row are broadcast. Rows are read where they lie and no lane stays empty for want of rows, so a few rows run at
   nearly the speed of many, and a block is read from its first byte to its last. */

#define OUTPUTS 64         /* of a block at a time */
#define INPUTS_AT_ONCE 128 /* where a block is wider than a tile: all its tiles go over so many before the next */
#define MOST_WIDE 4        /* vectors of a tile with few rows */
#define MOST_IN_ROWS 16    /* neurons of an expert whose projections may lie in rows */
#define BYTES_AHEAD 8192   /* between what is computed and what is fetched, where a block is read once */

/* What a tile fetches beside its own work: a line for every vector of weights, `step` bytes further with each input. */
typedef struct {
    const char *at;
    int64_t step;
} fetch;

/* One of the tiles of rows that a block is multiplied with. */
typedef struct {
    int64_t number, of;
} turn;

/* Where the sums of a tile go: z[i] = [z[i] +] (scale[i] bias + a[i] w), row after row, as two may be the same. */
typedef struct {
    float *z[TALL];
    float scale[TALL];
    const float *bias;
    int64_t adds; /* to what is there; then all inputs are taken at once */
} sums;

/* Of inputs `from` to `to`, rows <= TALL by vectors <= MOST_WIDE, the last with `last` outputs; they are `first` outputs
   into z and bias. Weights of one input are `width` after those of the one before. */
INLINE void tile_outputs(const float *const *a, const float *w, int64_t width, int64_t from, int64_t to, int rows,
                         int vectors, int64_t last, fetch next, const sums *s, int64_t first) {
    vf acc[TALL][MOST_WIDE];
    float *z[TALL];
    UNROLL
    for (int i = 0; i < rows; i++) z[i] = s->z[i] + first;
    UNROLL
    for (int v = 0; v < vectors; v++) {
        int64_t lanes = v < vectors - 1 ? VL : last;
        vf bias = s->bias && !from ? (vf)load_words(s->bias + first + v * VL, lanes) : splat(0.0f);
        UNROLL
        for (int i = 0; i < rows; i++)
            acc[i][v] = from ? (vf)load_words(z[i] + v * VL, lanes) : splat(s->scale[i]) * bias;
    }
    int64_t adds = s->adds;
    w += from * width;
    next.at += from * next.step;
    for (int64_t d = from; d < to; d++, w += width, next.at += next.step) {
        vf weight[MOST_WIDE];
        UNROLL
        for (int v = 0; v < vectors; v++) {
            weight[v] = (vf)load_words(w + v * VL, v < vectors - 1 ? VL : last);
            if (v * VL * 4 % LINE == 0) __builtin_prefetch(next.at + v * VL * 4);
        }
        UNROLL
        for (int i = 0; i < rows; i++) {
            vf value = splat(a[i][d]);
            UNROLL
            for (int v = 0; v < vectors; v++) acc[i][v] += value * weight[v];
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int v = 0; v < vectors; v++) {
            int64_t lanes = v < vectors - 1 ? VL : last;
            if (adds) acc[i][v] += (vf)load_words(z[i] + v * VL, lanes);
            store_part(z[i] + v * VL, acc[i][v], lanes * 4);
        }
}

/* A block half a vector wide: a vector holds what two inputs have, and then a lane every second of them. */
INLINE void half_tile(const float *const *a, const float *w, int64_t inner, int rows, fetch next, const sums *s) {
    vf acc[TALL];
    UNROLL
    for (int i = 0; i < rows; i++) acc[i] = splat(0.0f);
    int64_t d = 0;
    for (; d + 1 < inner; d += 2, next.at += 2 * next.step) {
        vf weight = loadf(w + d * HALF);
        weight = SHUFFLE(weight, weight, MIX);
        __builtin_prefetch(next.at);
        UNROLL
        for (int i = 0; i < rows; i++) acc[i] += splat_two(a[i] + d) * weight;
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        vf sum = acc[i] + SHUFFLE(acc[i], acc[i], SWAP);
        sum = SHUFFLE(sum, sum, EVEN);
        if (d < inner) sum += splat(a[i][d]) * (vf)load_words(w + d * HALF, HALF);
        if (s->bias) sum += splat(s->scale[i]) * (vf)load_words(s->bias, HALF);
        if (s->adds) sum += (vf)load_words(s->z[i], HALF);
        store_part(s->z[i], sum, HALF * 4);
    }
}

static void half_block(const float *const *a, int64_t rows, const float *w, int64_t inner, fetch next, const sums *s) {
    switch (rows) {
    case 6: half_tile(a, w, inner, 6, next, s); break;
    case 5: half_tile(a, w, inner, 5, next, s); break;
    case 4: half_tile(a, w, inner, 4, next, s); break;
    case 3: half_tile(a, w, inner, 3, next, s); break;
    case 2: half_tile(a, w, inner, 2, next, s); break;
    default: half_tile(a, w, inner, 1, next, s);
    }
}

INLINE void rows_by_outputs(const float *const *a, int64_t rows, const float *w, int64_t width, int64_t from,
                            int64_t to, int vectors, int64_t last, fetch next, const sums *s, int64_t first) {
    switch (rows) {
    case 6: tile_outputs(a, w, width, from, to, 6, least(vectors, WIDE), last, next, s, first); break;
    case 5: tile_outputs(a, w, width, from, to, 5, least(vectors, WIDE), last, next, s, first); break;
    case 4: tile_outputs(a, w, width, from, to, 4, least(vectors, WIDE), last, next, s, first); break;
    case 3: tile_outputs(a, w, width, from, to, 3, vectors, last, next, s, first); break;
    case 2: tile_outputs(a, w, width, from, to, 2, vectors, last, next, s, first); break;
    default: tile_outputs(a, w, width, from, to, 1, vectors, last, next, s, first);
    }
}

INLINE void tile_of(const float *const *a, int64_t rows, const float *w, int64_t width, int64_t from, int64_t to,
                    int64_t vectors, int64_t last, fetch next, const sums *s, int64_t first) {
    switch (vectors) {
    case 4: rows_by_outputs(a, rows, w, width, from, to, 4, last, next, s, first); break;
    case 3: rows_by_outputs(a, rows, w, width, from, to, 3, last, next, s, first); break;
    case 2: rows_by_outputs(a, rows, w, width, from, to, 2, last, next, s, first); break;
    default: rows_by_outputs(a, rows, w, width, from, to, 1, last, next, s, first);
    }
}

/* Of so many outputs: loads under a mask, which cost more, only where there is a rest. */
static void tile_part(const float *const *a, int64_t rows, const float *w, int64_t width, int64_t from, int64_t to,
                      int64_t outputs, fetch next, const sums *s, int64_t first) {
    int64_t vectors = parts_of(outputs, VL), last = outputs % VL;
    if (last) tile_of(a, rows, w, width, from, to, vectors, last, next, s, first);
    else tile_of(a, rows, w, width, from, to, vectors, VL, next, s, first);
}

/* Each turn fetches its share of the next block: memory is then read at an even pace, not while one tile waits. */
static fetch to_fetch(turn now, const char *block, const char *next_block, int64_t inner, int64_t row) {
    if (now.of == 1) return (fetch){block + BYTES_AHEAD, row};
    if (!next_block) return (fetch){block + (now.number ? 0 : BYTES_AHEAD), row};
    int64_t step = row / now.of;
    return (fetch){next_block + now.number * inner * step, step};
}

/* rows <= TALL by the outputs <= OUTPUTS from `first` on, which lie in one block. z and bias begin at `first`. */
static void product_outputs(const float *const *a, int64_t rows, const matrix *m, int64_t expert, int64_t first,
                            int64_t outputs, int64_t inner, turn now, const char *next_block, const sums *s) {
    int64_t width = m->row / 4, wide = (rows > TALL / 2 ? WIDE : MOST_WIDE) * VL;
    const char *block = block_at(m, expert, first / width, inner);
    const float *w = (const float *)block + first % width;
    fetch next = to_fetch(now, block, next_block, inner, m->row);
    if (width == HALF && outputs == HALF) return half_block(a, rows, w, inner, next, s);
    int64_t part = outputs <= wide || s->adds ? inner : INPUTS_AT_ONCE, from = 0;
    do {
        for (int64_t n = 0; n < outputs; n += wide) {
            fetch beside = {next.at + n * 4, next.step};
            tile_part(a, rows, w + n, width, from, least(from + part, inner), least(outputs - n, wide), beside, s, n);
        }
        from += part;
    } while (from < inner); /* once where there is no input: then the bias is all */
}

/* How many of the rows left a turn takes, so that all take about as many. */
static int64_t rows_of_turn(turn now, int64_t left) {
    return parts_of(left, now.of - now.number);
}

/* The block that is likely to be needed next. */
static const char *block_after(const job *j, const matrix *m, int64_t expert, int64_t number, int64_t outputs,
                               int64_t inner) {
    number += j->takers;
    return number * (m->row / 4) < outputs ? block_at(m, expert, number, inner) : j->after;
}

static const float *bias_of(const matrix *m, int64_t expert, int64_t first) {
    return m->bias ? (const float *)(m->bias + expert * m->bias_expert) + first : NULL;
}

/* Into rows of `z`, not weighted. */
static sums plain_sums(float *z, int64_t row, const float *bias) {
    sums s = {.bias = bias};
    for (int64_t i = 0; i < TALL; i++) s.z[i] = z + i * row, s.scale[i] = 1.0f;
    return s;
}

/* Of hidden values that are multiplied by the routing weight of their pair. */
static void up_outputs(job *j, const segment *s, int64_t first, int64_t outputs) {
    int64_t number = first / (j->up.row / 4);
    const char *next = block_after(j, &j->up, s->expert, number, j->width, j->inner);
    const char *next_gate = j->gate.data ? block_after(j, &j->gate, s->expert, number, j->width, j->inner) : NULL;
    float z[TALL * OUTPUTS] = {0}, gate[TALL * OUTPUTS] = {0}; /* activated in whole vectors */
    sums into_z = plain_sums(z, outputs, bias_of(&j->up, s->expert, first));
    sums into_gate = plain_sums(gate, outputs, bias_of(&j->gate, s->expert, first));
    turn now = {0, parts_of(s->rows, TALL)};
    for (int64_t done = 0, rows; done < s->rows; done += rows, now.number++) {
        const float *a[TALL];
        rows = rows_of_turn(now, s->rows - done);
        for (int64_t i = 0; i < rows; i++) a[i] = (const float *)x_of(j, s->first + done + i);
        product_outputs(a, rows, &j->up, s->expert, first, outputs, j->inner, now, next, &into_z);
        if (j->gate.data)
            product_outputs(a, rows, &j->gate, s->expert, first, outputs, j->inner, now, next_gate, &into_gate);
        activate(j->gate.data ? gate : z, rows * outputs, (int)j->activation);
        if (j->gate.data)
            for (int64_t i = 0; i < rows * outputs; i++) z[i] *= gate[i];
        for (int64_t i = 0; i < rows; i++) {
            float *to = (float *)(j->hidden_rows + (s->row + done + i) * j->hidden_row) + first;
            float weight = weight_of(j, j->order[s->first + done + i]);
            for (int64_t n = 0; n < outputs; n++) to[n] = z[i * outputs + n] * weight;
        }
    }
}

/* Into `out`, or by tokens added to y, where no other thread adds to its rows. */
static void down_outputs(job *j, const segment *s, int64_t first, int64_t outputs) {
    const char *next = block_after(j, &j->down, s->expert, first / (j->down.row / 4), j->outputs, j->width);
    sums weighted = {.bias = bias_of(&j->down, s->expert, first), .adds = j->by_tokens};
    turn now = {0, parts_of(s->rows, TALL)};
    for (int64_t done = 0, rows; done < s->rows; done += rows, now.number++) {
        const float *a[TALL];
        rows = rows_of_turn(now, s->rows - done);
        for (int64_t i = 0; i < rows; i++) {
            int64_t pair = j->order[s->first + done + i];
            float *to = j->by_tokens ? (float *)j->y + pair / j->slots * j->outputs : j->out + pair * j->outputs;
            a[i] = (const float *)(j->hidden_rows + (s->row + done + i) * j->hidden_row);
            weighted.z[i] = to + first;
            weighted.scale[i] = weight_of(j, pair);
        }
        product_outputs(a, rows, &j->down, s->expert, first, outputs, j->width, now, next, &weighted);
    }
}

/* z [rows][z_row] = a w^T + bias, with weights in rows as well. */
static void product_of_rows(const char *const *a, int64_t rows, const char *w, int64_t stride, int64_t outputs,
                            int64_t inner, const float *bias, float *z, int64_t z_row) {
    product_rows(a, rows, w, stride, outputs, inner, 0, z, z_row);
    for (int64_t i = 0; bias && i < rows; i++)
        for (int64_t n = 0; n < outputs; n++) z[i * z_row + n] += bias[n];
}

/* Few neurons, whose weights lie in rows: to broadcast what they read would take a load for each of their products. */
static void up_rows_of_few(job *j, const segment *s) {
    float z[TILE_ROWS * MOST_IN_ROWS] = {0}, gate[TILE_ROWS * MOST_IN_ROWS] = {0};
    const matrix *weights[2] = {&j->up, &j->gate};
    float *results[2] = {z, gate};
    int64_t z_row = round_up(j->width, 4);
    int gated = j->gate.data != NULL;
    turn now = {0, parts_of(s->rows, TILE_ROWS)};
    for (int64_t done = 0, rows; done < s->rows; done += rows, now.number++) {
        const char *a[TILE_ROWS];
        rows = rows_of_turn(now, s->rows - done);
        for (int64_t i = 0; i < rows; i++) a[i] = x_of(j, s->first + done + i);
        for (int m = 0; m <= gated; m++) {
            const char *w = weights[m]->data + s->expert * weights[m]->expert;
            const float *bias = bias_of(weights[m], s->expert, 0);
            product_of_rows(a, rows, w, weights[m]->row, j->width, j->inner, bias, results[m], z_row);
        }
        activate(gated ? gate : z, rows * z_row, (int)j->activation);
        for (int64_t i = 0; i < rows; i++) {
            float *to = (float *)(j->hidden_rows + (s->row + done + i) * j->hidden_row);
            float weight = weight_of(j, j->order[s->first + done + i]);
            for (int64_t n = 0; n < j->width; n++)
                to[n] = (gated ? z[i * z_row + n] * gate[i * z_row + n] : z[i * z_row + n]) * weight;
        }
    }
}

static void up_block(job *j, const segment *s, int64_t number) {
    if (j->up_in_rows) return up_rows_of_few(j, s);
    int64_t width = j->up.row / 4, end = least((number + 1) * width, j->width);
    for (int64_t n = number * width; n < end; n += OUTPUTS) up_outputs(j, s, n, least(end - n, OUTPUTS));
}

static void down_block(job *j, const segment *s, int64_t number) {
    int64_t width = j->down.row / 4, end = least((number + 1) * width, j->outputs);
    for (int64_t n = number * width; n < end; n += OUTPUTS) down_outputs(j, s, n, least(end - n, OUTPUTS));
}
