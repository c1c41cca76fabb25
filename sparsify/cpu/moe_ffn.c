/* sparsify::moe_ffn on a CPU, fp32 and bf16: gather, expert products, activation and weighted sum in one call.

   A pair is a token t and a slot k, number t * K + k. Pairs are sorted by expert and cut into segments of one expert,
   whose rows lie in panels of VL rows, a few left over as they are (see products.h). Four phases with a barrier after
   each; threads take tasks from a counter. Where there are many segments for each thread, a thread takes one through
   phases 0 to 2 by itself. One task computes a value, in an order that depends on the shapes only, so the result is the
   same bits with any number of threads.

     0  pack      panel                      x rows of the panel, transposed
     1  up        segment x COLUMNS neurons  hidden = act(x up^T + b), or act(x gate^T + b) * (x up^T + b)
     2  down      segment x COLUMNS outputs  out[pair] = (hidden down^T + b) * routing weight
     3  combine   TOKENS tokens              y[t] = sum of out over the slots of t, first to last

   Nothing here creates threads: the caller passes the entry points of the OpenMP runtime that torch runs on. */
#include <stdlib.h>

#include "vector.h"

#include "activations.h"
#include "products.h"

#define PHASES 4
#define TOKENS 8
#define ROWS_MAX (VL * 3 / 4)    /* so many rows left over are cheaper as they are than as a panel with empty lanes */
#define SEGMENT_BYTES (512 << 10) /* packed rows of a segment: half of a usual L2 cache */
#define SEGMENT_PANELS 8
#define CHUNK_PAIRS 2048    /* so many pairs at a time, or SEGMENT_PANELS panels for each expert: bounds the memory */
#define MANY_SEGMENTS 16    /* for each thread: then whole segments are shared out evenly enough */
#define KEPT_BYTES (64 << 20)

enum { FINE, BAD_EXPERT, NO_MEMORY };

typedef struct {
    const char *data;
    int64_t expert; /* bytes from one expert to the next */
    int64_t row;    /* bytes from one row to the next */
    const char *bias;
    int64_t bias_expert;
} matrix;

typedef struct {
    int64_t expert, first; /* first sorted position */
    int64_t panel_rows, panels, rows;
    int64_t panel, row; /* first panel and first unpacked row in the scratch memory */
} segment;

typedef struct {
    const char *x;
    int64_t x_row;
    const float *routing;
    const int64_t *ids;
    matrix up, gate, down;
    char *y;
    int64_t tokens, inner, width, outputs, experts, slots, activation, bf16;
    void (*barrier)(void);
    int64_t *order; /* sorted position -> pair */
    segment *segments;
    int64_t *panel_segment;
    int64_t num_segments, num_panels, num_rows;
    int64_t x_panel, hidden_panel, hidden_row; /* bytes */
    char *packed, *hidden_panels, *hidden_rows;
    float *out; /* [pairs][outputs] */
    int64_t whole, arrived, next[PHASES], tasks[PHASES];
} job;

static int64_t round_up(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t blocks_of(int64_t columns) {
    return (columns + COLUMNS - 1) / COLUMNS;
}

INLINE float bias_at(const matrix *m, int64_t expert, int64_t column, int64_t bf16) {
    const char *row = m->bias + expert * m->bias_expert;
    if (!bf16) return ((const float *)row)[column];
    return bf16_value(((const uint16_t *)row)[column]);
}

static const char *x_of(const job *j, int64_t position) {
    return j->x + j->order[position] / j->slots * j->x_row;
}

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
    float z[ROWS_MAX * COLUMNS] = {0}, gate[ROWS_MAX * COLUMNS] = {0};
    const char *a[ROWS_MAX];
    for (int64_t i = 0; i < s->rows; i++) a[i] = x_of(j, s->first + s->panel_rows + i);
    const matrix *weights[2] = {&j->up, &j->gate};
    float *results[2] = {z, gate};
    int gated = j->gate.data != NULL;
    for (int m = 0; m <= gated; m++) {
        const char *w = weights[m]->data + s->expert * weights[m]->expert + first * weights[m]->row;
        product_rows(a, s->rows, w, weights[m]->row, columns, j->inner, (int)j->bf16, results[m]);
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
    int64_t blocks = blocks_of(j->width);
    const segment *s = j->segments + task / blocks;
    int64_t first = task % blocks * COLUMNS, columns = least(j->width - first, COLUMNS);
    if (s->panels) up_panels(j, s, first, columns);
    if (s->rows) up_rows(j, s, first, columns);
}

static void down_panels(job *j, const segment *s, int64_t first, int64_t columns) {
    const char *w = j->down.data + s->expert * j->down.expert + first * j->down.row;
    for (int64_t done = 0, panels; done < s->panels; done += panels) {
        panels = least(s->panels - done, TILE_PANELS);
        float z[COLUMNS * TILE_PANELS * VL] = {0};
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
                    vf row = v[i] * splat(j->routing[pairs[i]]);
                    char *to = (char *)(j->out + pairs[i] * j->outputs + first + n);
                    if (bytes == VL * 4) memcpy(to, &row, VL * 4);
                    else memcpy(to, &row, bytes);
                }
            }
        }
    }
}

static void down_rows(job *j, const segment *s, int64_t first, int64_t columns) {
    float z[ROWS_MAX * COLUMNS] = {0};
    const char *a[ROWS_MAX];
    const char *w = j->down.data + s->expert * j->down.expert + first * j->down.row;
    for (int64_t i = 0; i < s->rows; i++) a[i] = j->hidden_rows + (s->row + i) * j->hidden_row;
    product_rows(a, s->rows, w, j->down.row, columns, j->width, (int)j->bf16, z);
    add_bias_rows(&j->down, s->expert, first, columns, s->rows, j->bf16, z);
    for (int64_t i = 0; i < s->rows; i++) {
        int64_t pair = j->order[s->first + s->panel_rows + i];
        float *to = j->out + pair * j->outputs + first;
        for (int64_t n = 0; n < columns; n++) to[n] = z[i * COLUMNS + n] * j->routing[pair];
    }
}

static void down(job *j, int64_t task) {
    int64_t blocks = blocks_of(j->outputs);
    const segment *s = j->segments + task / blocks;
    int64_t first = task % blocks * COLUMNS, columns = least(j->outputs - first, COLUMNS);
    if (s->panels) down_panels(j, s, first, columns);
    if (s->rows) down_rows(j, s, first, columns);
}

static void combine(job *j, int64_t task) {
    int64_t last = least((task + 1) * TOKENS, j->tokens);
    for (int64_t t = task * TOKENS; t < last; t++) {
        for (int64_t n = 0; n < j->outputs; n += VL) {
            int64_t columns = least(j->outputs - n, VL);
            vf sum = splat(0.0f);
            for (int64_t k = 0; k < j->slots; k++) {
                int64_t pair = t * j->slots + k;
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

/* Segments from packing to down in one thread, with memory for one segment that stays in the cache of its core. */
static void whole(job *shared) {
    job j = *shared;
    int64_t up_blocks = blocks_of(j.width), down_blocks = blocks_of(j.outputs);
    int64_t thread = __atomic_fetch_add(&shared->arrived, 1, __ATOMIC_RELAXED);
    for (int64_t task; (task = __atomic_fetch_add(&shared->next[0], 1, __ATOMIC_RELAXED)) < j.num_segments;) {
        const segment *s = j.segments + task;
        j.packed = shared->packed + (thread * SEGMENT_PANELS - s->panel) * j.x_panel;
        j.hidden_panels = shared->hidden_panels + (thread * SEGMENT_PANELS - s->panel) * j.hidden_panel;
        j.hidden_rows = shared->hidden_rows + (thread * ROWS_MAX - s->row) * j.hidden_row;
        for (int64_t p = 0; p < s->panels; p++) pack(&j, s->panel + p);
        for (int64_t b = 0; b < up_blocks; b++) up(&j, task * up_blocks + b);
        for (int64_t b = 0; b < down_blocks; b++) down(&j, task * down_blocks + b);
    }
}

static void work(void *data) {
    static void (*const phases[PHASES])(job *, int64_t) = {pack, up, down, combine};
    job *j = data;
    if (j->whole) {
        whole(j);
        if (j->barrier) j->barrier();
    }
    for (int phase = j->whole ? PHASES - 1 : 0; phase < PHASES; phase++) {
        if (!j->tasks[phase]) continue;
        for (int64_t task; (task = __atomic_fetch_add(&j->next[phase], 1, __ATOMIC_RELAXED)) < j->tasks[phase];)
            phases[phase](j, task);
        if (j->barrier && phase < PHASES - 1) j->barrier();
    }
}

/* Counting sort, and the segments of every expert. `ends` [experts + 1] is scratch. */
static int plan(job *j, int64_t *ends) {
    int64_t pairs = j->tokens * j->slots, segment_rows = SEGMENT_BYTES / (j->x_panel / VL + 1) / VL * VL;
    segment_rows = least(segment_rows < VL ? VL : segment_rows, SEGMENT_PANELS * VL);
    memset(ends, 0, (size_t)(j->experts + 1) * sizeof *ends);
    for (int64_t pair = 0; pair < pairs; pair++) {
        int64_t e = j->ids[pair];
        if (e < -1 || e >= j->experts) return BAD_EXPERT;
        if (e >= 0) ends[e + 1]++;
    }
    for (int64_t e = 0; e < j->experts; e++) {
        int64_t count = ends[e + 1], first = ends[e];
        ends[e + 1] += first;
        int64_t parts = (count + segment_rows - 1) / segment_rows;
        int64_t part = parts ? round_up((count + parts - 1) / parts, VL) : 0;
        for (int64_t done = 0; done < count; done += part) {
            segment *s = j->segments + j->num_segments;
            int64_t rows = least(count - done, part), over = rows % VL;
            *s = (segment){.expert = e, .first = first + done, .panel = j->num_panels, .row = j->num_rows};
            s->rows = over <= ROWS_MAX ? over : 0;
            s->panel_rows = rows - s->rows;
            s->panels = (s->panel_rows + VL - 1) / VL;
            for (int64_t p = 0; p < s->panels; p++) j->panel_segment[j->num_panels + p] = j->num_segments;
            j->num_panels += s->panels;
            j->num_rows += s->rows;
            j->num_segments++;
        }
    }
    for (int64_t pair = 0; pair < pairs; pair++)
        if (j->ids[pair] >= 0) j->order[ends[j->ids[pair]]++] = pair;
    return FINE;
}

/* One buffer is kept between calls, since fresh pages cost a tenth of a large call. A call that finds it in use by another
   thread takes memory of its own. */
static char *kept;

static char *take(int64_t bytes) {
    char *found = __atomic_exchange_n(&kept, NULL, __ATOMIC_ACQUIRE);
    if (found && *(int64_t *)found >= bytes) return found;
    free(found);
    found = aligned_alloc(64, (size_t)bytes);
    if (found) *(int64_t *)found = bytes;
    return found;
}

static void give_back(char *buffer) {
    if (buffer && *(int64_t *)buffer > KEPT_BYTES) free(buffer);
    else free(__atomic_exchange_n(&kept, buffer, __ATOMIC_RELEASE));
}

static char *cut(char **from, int64_t bytes) {
    char *start = *from;
    *from += round_up(bytes, 64);
    return start;
}

static int run(job *j, int64_t threads, int64_t poison, void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    int64_t size = j->bf16 ? 2 : 4, pairs = j->tokens * j->slots;
    j->x_panel = (j->inner * size + 3) / 4 * 4 * VL;
    j->hidden_panel = (j->width * size + 3) / 4 * 4 * VL;
    j->hidden_row = round_up(j->width * size, 64);
    /* Every part but the last of an expert holds at least VL rows. */
    int64_t most = least(pairs, j->experts + pairs / VL) + 1;
    int64_t list_bytes = round_up(pairs * 8, 64) + round_up((j->experts + 1) * 8, 64) +
                         round_up(most * (int64_t)sizeof(segment), 64) + round_up(most * 8, 64);
    char *lists = malloc((size_t)list_bytes), *at = lists;
    if (!lists) return NO_MEMORY;
    j->order = (int64_t *)cut(&at, pairs * 8);
    int64_t *ends = (int64_t *)cut(&at, (j->experts + 1) * 8);
    j->segments = (segment *)cut(&at, most * (int64_t)sizeof(segment));
    j->panel_segment = (int64_t *)cut(&at, most * 8);
    int status = plan(j, ends);
    j->whole = j->num_segments >= MANY_SEGMENTS * threads;
    int64_t panels = j->whole ? SEGMENT_PANELS * threads : j->num_panels;
    int64_t rows = j->whole ? ROWS_MAX * threads : j->num_rows;
    int64_t bytes = round_up(panels * j->x_panel, 64) + round_up(panels * j->hidden_panel, 64) +
                    round_up(rows * j->hidden_row, 64) + round_up(pairs * j->outputs * 4, 64) + 64; /* 64 for its size */
    char *scratch = status == FINE ? take(bytes) : NULL;
    if (status == FINE && !scratch) status = NO_MEMORY;
    if (status == FINE) {
        at = scratch + 64;
        if (poison) memset(at, 0xff, (size_t)bytes - 64);
        j->packed = cut(&at, panels * j->x_panel);
        j->hidden_panels = cut(&at, panels * j->hidden_panel);
        j->hidden_rows = cut(&at, rows * j->hidden_row);
        j->out = (float *)cut(&at, pairs * j->outputs * 4);
        j->tasks[0] = j->num_panels;
        j->tasks[1] = j->num_segments * blocks_of(j->width);
        j->tasks[2] = j->num_segments * blocks_of(j->outputs);
        j->tasks[3] = (j->tokens + TOKENS - 1) / TOKENS;
        if (threads > 1) parallel(work, j, (unsigned)threads, 0);
        else work(j);
    }
    give_back(scratch);
    free(lists);
    return status;
}

static matrix matrix_at(const int64_t *a) {
    return (matrix){(const char *)(intptr_t)a[0], a[1], a[2], (const char *)(intptr_t)a[3], a[4]};
}

/* `a` is what sparsify/cpu/kernel.py packs, in the same order; pointers are numbers, strides count bytes. */
int sparsify_moe_ffn(const int64_t *a) {
    job j = {
        .x = (const char *)(intptr_t)a[0],
        .x_row = a[1],
        .routing = (const float *)(intptr_t)a[2],
        .ids = (const int64_t *)(intptr_t)a[3],
        .y = (char *)(intptr_t)a[4],
        .tokens = a[5],
        .inner = a[6],
        .width = a[7],
        .outputs = a[8],
        .experts = a[9],
        .slots = a[10],
        .activation = a[11],
        .bf16 = a[12],
        .barrier = a[13] > 1 ? (void (*)(void))(intptr_t)a[16] : NULL,
        .up = matrix_at(a + 17),
        .gate = matrix_at(a + 22),
        .down = matrix_at(a + 27),
    };
    int64_t chunk = j.experts * SEGMENT_PANELS * VL > CHUNK_PAIRS ? j.experts * SEGMENT_PANELS * VL : CHUNK_PAIRS;
    chunk = round_up(chunk / j.slots + 1, TOKENS);
    int64_t size = j.bf16 ? 2 : 4;
    for (int64_t first = 0; first < a[5]; first += chunk) {
        job part = j;
        part.tokens = least(a[5] - first, chunk);
        part.x += first * j.x_row;
        part.routing += first * j.slots;
        part.ids += first * j.slots;
        part.y += first * j.outputs * size;
        int status = run(&part, a[13], a[14], (void (*)(void (*)(void *), void *, unsigned, unsigned))(intptr_t)a[15]);
        if (status != FINE) return status;
    }
    return FINE;
}
