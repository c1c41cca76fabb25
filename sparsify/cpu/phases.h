/* One task of each of the four phases; see moe_ffn.c. */

static void pack(job *j, int64_t panel) {
    const segment *s = j->segments + j->panel_segment[panel];
    int64_t done = (panel - s->panel) * VL, bytes = j->inner * (j->bf16 ? 2 : 4);
    const char *rows[VL];
    for (int64_t i = 0; i < VL; i++) rows[i] = done + i < s->panel_rows ? x_of(j, s->first + done + i) : NULL;
    char *to = j->packed + panel * j->x_panel;
    for (int64_t at = 0; at < bytes; at += VL * 4) {
        vu v[VL];
        int64_t left = bytes - at;
        for (int64_t i = 0; i < VL; i++) {
            v[i] = (vu){0};
            if (rows[i]) v[i] = left >= VL * 4 ? load(rows[i] + at) : load_part(rows[i] + at, left);
        }
        transpose((vf *)v);
        int64_t words = least((left + 3) / 4, VL);
        for (int64_t i = 0; i < words; i++) memcpy(to + (at + i * 4) * VL, v + i, sizeof *v);
    }
}

/* z [columns][lanes] += bias of each column. */
static void add_bias_panels(const matrix *m, int64_t expert, int64_t first, int64_t columns, int64_t lanes,
                            int64_t bf16, float *z) {
    if (!m->bias) return;
    for (int64_t n = 0; n < columns; n++) {
        float bias = bias_at(m, expert, first + n, bf16);
        for (int64_t i = 0; i < lanes; i++) z[n * lanes + i] += bias;
    }
}

/* z [rows][COLUMNS] += bias of each column. */
static void add_bias_rows(const matrix *m, int64_t expert, int64_t first, int64_t columns, int64_t rows, int64_t bf16,
                          float *z) {
    if (!m->bias) return;
    float bias[COLUMNS] = {0};
    for (int64_t n = 0; n < columns; n++) bias[n] = bias_at(m, expert, first + n, bf16);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t n = 0; n < COLUMNS; n++) z[i * COLUMNS + n] += bias[n];
}

static void up_panels(job *j, const segment *s, int64_t first, int64_t columns) {
    for (int64_t done = 0, panels; done < s->panels; done += panels) {
        panels = least(s->panels - done, TILE_PANELS);
        float z[COLUMNS * TILE_PANELS * VL], gate[COLUMNS * TILE_PANELS * VL];
        int64_t lanes = panels * VL;
        const char *a = j->packed + (s->panel + done) * j->x_panel;
        const matrix *weights[2] = {&j->up, &j->gate};
        float *results[2] = {z, gate};
        int gated = j->gate.data != NULL;
        for (int m = 0; m <= gated; m++) {
            const char *w = weights[m]->data + s->expert * weights[m]->expert + first * weights[m]->row;
            product_panels(a, j->x_panel, w, weights[m]->row, columns, j->inner, (int)j->bf16, panels,
                           done == 0, results[m]);
            add_bias_panels(weights[m], s->expert, first, columns, lanes, j->bf16, results[m]);
        }
        activate(gated ? gate : z, columns * lanes, (int)j->activation);
        if (gated)
            for (int64_t i = 0; i < columns * lanes; i++) z[i] *= gate[i];
        for (int64_t p = 0; p < panels; p++) {
            char *to = j->hidden_panels + (s->panel + done + p) * j->hidden_panel;
            if (!j->bf16) {
                for (int64_t n = 0; n < columns; n++)
                    memcpy(to + (first + n) * VL * 4, z + (n * panels + p) * VL, VL * 4);
                continue;
            }
            for (int64_t n = 0; n < columns; n += 2) {
                vu word = bf16_bits(loadf(z + (n * panels + p) * VL));
                if (n + 1 < columns) word |= bf16_bits(loadf(z + ((n + 1) * panels + p) * VL)) << 16;
                memcpy(to + (first + n) / 2 * VL * 4, &word, sizeof word);
            }
        }
    }
}

static void up_rows(job *j, const segment *s, int64_t first, int64_t columns) {
    float z[ROWS_MAX * COLUMNS], gate[ROWS_MAX * COLUMNS];
    const char *a[ROWS_MAX];
    for (int64_t i = 0; i < s->rows; i++) a[i] = x_of(j, s->first + s->panel_rows + i);
    const matrix *weights[2] = {&j->up, &j->gate};
    float *results[2] = {z, gate};
    int gated = j->gate.data != NULL;
    for (int m = 0; m <= gated; m++) {
        const char *w = weights[m]->data + s->expert * weights[m]->expert + first * weights[m]->row;
        memset(results[m], 0, (size_t)(s->rows * COLUMNS) * 4);
        product_rows(a, s->rows, w, weights[m]->row, columns, j->inner, (int)j->bf16, results[m], COLUMNS);
        add_bias_rows(weights[m], s->expert, first, columns, s->rows, j->bf16, results[m]);
    }
    activate(gated ? gate : z, s->rows * COLUMNS, (int)j->activation);
    if (gated)
        for (int64_t i = 0; i < s->rows * COLUMNS; i++) z[i] *= gate[i];
    for (int64_t i = 0; i < s->rows; i++) {
        char *to = j->hidden_rows + (s->row + i) * j->hidden_row + first * (j->bf16 ? 2 : 4);
        if (!j->bf16) {
            memcpy(to, z + i * COLUMNS, (size_t)columns * 4);
            continue;
        }
        uint16_t narrow[COLUMNS];
        for (int64_t n = 0; n < COLUMNS; n += VL) {
            vh half = __builtin_convertvector(bf16_bits(loadf(z + i * COLUMNS + n)), vh);
            memcpy(narrow + n, &half, sizeof half);
        }
        memcpy(to, narrow, (size_t)columns * 2);
    }
}

static void up(job *j, int64_t task) {
    int64_t blocks = up_blocks(j);
    const segment *s = j->segments + task / blocks;
    if (j->in_blocks) return up_block(j, s, task % blocks);
    int64_t first = task % blocks * COLUMNS, columns = least(j->width - first, COLUMNS);
    if (s->panels) up_panels(j, s, first, columns);
    if (s->rows) up_rows(j, s, first, columns);
}

static void down_panels(job *j, const segment *s, int64_t first, int64_t columns) {
    const char *w = j->down.data + s->expert * j->down.expert + first * j->down.row;
    for (int64_t done = 0, panels; done < s->panels; done += panels) {
        panels = least(s->panels - done, TILE_PANELS);
        float z[COLUMNS * TILE_PANELS * VL];
        if (columns % VL) memset(z + columns * panels * VL, 0, (size_t)((VL - columns % VL) * panels * VL) * 4);
        const char *a = j->hidden_panels + (s->panel + done) * j->hidden_panel;
        product_panels(a, j->hidden_panel, w, j->down.row, columns, j->width, (int)j->bf16, panels, done == 0,
                       z);
        add_bias_panels(&j->down, s->expert, first, columns, panels * VL, j->bf16, z);
        for (int64_t p = 0; p < panels; p++) {
            int64_t begin = (done + p) * VL, lanes = least(s->panel_rows - begin, VL);
            const int64_t *pairs = j->order + s->first + begin;
            for (int64_t n = 0; n < columns; n += VL) {
                vf v[VL];
                for (int64_t i = 0; i < VL; i++) v[i] = loadf(z + ((n + i) * panels + p) * VL);
                transpose(v);
                size_t bytes = (size_t)least(columns - n, VL) * 4;
                for (int64_t i = 0; i < lanes; i++) {
                    vf row = v[i] * splat(weight_of(j, pairs[i]));
                    char *to = (char *)(j->out + pairs[i] * j->outputs + first + n);
                    if (bytes == VL * 4) memcpy(to, &row, VL * 4);
                    else memcpy(to, &row, bytes);
                }
            }
        }
    }
}

static void down_rows(job *j, const segment *s, int64_t first, int64_t columns) {
    float z[ROWS_MAX * COLUMNS];
    const char *a[ROWS_MAX];
    const char *w = j->down.data + s->expert * j->down.expert + first * j->down.row;
    for (int64_t i = 0; i < s->rows; i++) a[i] = j->hidden_rows + (s->row + i) * j->hidden_row;
    memset(z, 0, (size_t)(s->rows * COLUMNS) * 4);
    product_rows(a, s->rows, w, j->down.row, columns, j->width, (int)j->bf16, z, COLUMNS);
    add_bias_rows(&j->down, s->expert, first, columns, s->rows, j->bf16, z);
    for (int64_t i = 0; i < s->rows; i++) {
        int64_t pair = j->order[s->first + s->panel_rows + i];
        float *to = j->out + pair * j->outputs + first, weight = weight_of(j, pair);
        for (int64_t n = 0; n < columns; n++) to[n] = z[i * COLUMNS + n] * weight;
    }
}

static void down(job *j, int64_t task) {
    int64_t blocks = down_blocks(j);
    const segment *s = j->segments + task / blocks;
    if (j->in_blocks) return down_block(j, s, task % blocks);
    int64_t first = task % blocks * COLUMNS, columns = least(j->outputs - first, COLUMNS);
    if (s->panels) down_panels(j, s, first, columns);
    if (s->rows) down_rows(j, s, first, columns);
}

/* Of VL outputs of a token, or of the columns that are left. */
static vf start_of_sum(const job *j, int64_t token, int64_t first, int64_t columns) {
    vf start = splat(0.0f);
    if (j->y_bias) start = (vf)load_part(j->y_bias + first, columns * 4);
    if (j->y_added) start += (vf)load_part(j->y_added + token * j->outputs + first, columns * 4);
    return start;
}

static void combine(job *j, int64_t task) {
    int64_t last = least((task + 1) * TOKENS, j->tokens);
    for (int64_t t = task * TOKENS; t < last; t++) {
        for (int64_t n = 0; n < j->outputs; n += VL) {
            int64_t columns = least(j->outputs - n, VL);
            vf sum = start_of_sum(j, t, n, columns);
            int64_t used = j->in_blocks ? j->num_used[t] : j->slots;
            for (int64_t k = 0; k < used; k++) {
                int64_t pair = j->in_blocks ? j->by_expert[t * j->slots + k] : t * j->slots + k;
                if (j->ids[pair] < 0) continue;
                const float *from = j->out + pair * j->outputs + n;
                sum += columns == VL ? loadf(from) : (vf)load_part(from, columns * 4);
            }
            if (!j->bf16) {
                char *to = j->y + (t * j->outputs + n) * 4;
                if (columns == VL) memcpy(to, &sum, sizeof sum);
                else memcpy(to, &sum, (size_t)columns * 4);
                continue;
            }
            vh half = __builtin_convertvector(bf16_bits(sum), vh);
            memcpy(j->y + (t * j->outputs + n) * 2, &half, (size_t)columns * 2);
        }
    }
}
