/* sparsify::moe_ffn on a CPU, fp32 and bf16: gather, expert products, activation and weighted sum in one call.

   A pair is a token t and a slot k, number t * K + k. Pairs are sorted by expert and cut into segments of one expert,
   whose rows lie in panels of VL rows, a few left over as they are (see products.h). Four phases with a barrier after
   each; threads take tasks from a counter. Where the segments can be shared out evenly, a thread takes one through phases
   0 to 2 by itself, the largest first. One task computes a value, in an order that depends on the shapes only, so the
   result is the same bits with any number of threads.

     0  pack      panel                      x rows of the panel, transposed
     1  up        segment x COLUMNS neurons  hidden = act(x up^T + b), or act(x gate^T + b) * (x up^T + b)
     2  down      segment x COLUMNS outputs  out[pair] = (hidden down^T + b) * routing weight
     3  combine   TOKENS tokens              y[t] = sum of out over the slots of t, first to last

   Weights may also lie in blocks (blocks.h): then there is nothing to pack, rows are taken as they are, hidden values are
   multiplied by the routing weight, and the sum is over the experts of t by their number. Narrow ones are then added to y
   by tokens, without `out` (by_tokens.h).

   Nothing here creates threads: the caller passes the entry points of the OpenMP runtime that torch runs on, or how
   onnxruntime runs a function in its threads (onnx_api.h). */
#include <stdlib.h>

#include "vector.h"

#include "activations.h"
#include "products.h"

#include "job.h"

#include "blocks.h"

#include "phases.h"

#include "scratch.h"

#include "few_inputs.h"

#include "by_tokens.h"

static void (*const phases[PHASES])(job *, int64_t) = {pack, up, down, combine};

static void take_tasks(job *j, int64_t phase) {
    for (int64_t task; (task = __atomic_fetch_add(&j->next[phase], 1, __ATOMIC_RELAXED)) < j->tasks[phase];)
        phases[phase](j, task);
}

/* Segments from packing to down in one thread, with memory for one segment that stays in the cache of its core. */
static void whole(job *shared) {
    job j = *shared;
    j.takers = 1;
    int64_t num_up = up_blocks(&j), num_down = down_blocks(&j);
    int64_t thread = __atomic_fetch_add(&shared->arrived, 1, __ATOMIC_RELAXED);
    for (int64_t task; (task = __atomic_fetch_add(&shared->next[0], 1, __ATOMIC_RELAXED)) < j.num_segments;) {
        int64_t index = j.largest_first[task];
        const segment *s = j.segments + index;
        j.packed = shared->packed + (thread * SEGMENT_PANELS - s->panel) * j.x_panel;
        j.hidden_panels = shared->hidden_panels + (thread * SEGMENT_PANELS - s->panel) * j.hidden_panel;
        j.hidden_rows = shared->hidden_rows + (thread * j.whole_rows - s->row) * j.hidden_row;
        for (int64_t p = 0; p < s->panels; p++) pack(&j, s->panel + p);
        j.after = block_at(&j.down, s->expert, 0, j.width);
        for (int64_t b = 0; b < num_up; b++) up(&j, index * num_up + b);
        int64_t likely = least(__atomic_load_n(&shared->next[0], __ATOMIC_RELAXED), j.num_segments - 1);
        j.after = block_at(&j.up, j.segments[j.largest_first[likely]].expert, 0, j.inner);
        for (int64_t b = 0; b < num_down; b++) down(&j, index * num_down + b);
    }
}

/* All phases, by threads that run at once and wait for each other. */
static void work(void *data) {
    job *j = data;
    if (j->whole) {
        whole(j);
        if (j->barrier) j->barrier();
    }
    for (int phase = j->whole ? PHASES - 1 : 0; phase < PHASES; phase++) {
        if (!j->tasks[phase]) continue;
        take_tasks(j, phase);
        if (j->barrier && phase < PHASES - 1) j->barrier();
    }
}

static void one_phase(void *data) {
    job *j = data;
    if (j->phase < 0) whole(j);
    else take_tasks(j, j->phase);
}

/* Phase by phase, where `parallel` gives no thread that another could wait for. */
static void work_in_phases(job *j, unsigned threads, parallel_function parallel) {
    for (j->phase = j->whole ? -1 : 0; j->phase < PHASES; j->phase += j->phase < 0 ? PHASES : 1) {
        if (j->phase < 0 || j->tasks[j->phase] > 1) parallel(one_phase, j, threads, 0);
        else one_phase(j);
    }
}

/* Segments by falling number of rows, so that the threads are done at about the same time. */
static void sort_segments(job *j) {
    int64_t starts[SEGMENT_PANELS * VL + 2] = {0}, most = SEGMENT_PANELS * VL;
    for (int64_t i = 0; i < j->num_segments; i++) starts[most - rows_of(j->segments + i) + 1]++;
    for (int64_t i = 0; i < most; i++) starts[i + 1] += starts[i];
    for (int64_t i = 0; i < j->num_segments; i++)
        j->largest_first[starts[most - rows_of(j->segments + i)]++] = i;
}

/* Whether whole segments can be shared out: a thread's share of the rows must be well above the largest of them. */
static int divides_well(const job *j, int64_t threads) {
    int64_t rows = 0, largest = 0;
    for (int64_t i = 0; i < j->num_segments; i++) {
        rows += rows_of(j->segments + i);
        if (largest < rows_of(j->segments + i)) largest = rows_of(j->segments + i);
    }
    return threads == 1 || rows >= FAIR_SHARE * threads * largest;
}

/* The pairs of each token as `order` has them, so that their sum is the one by tokens, bit for bit. */
static void list_by_expert(job *j, int64_t used) {
    memset(j->num_used, 0, (size_t)j->tokens * sizeof *j->num_used);
    for (int64_t position = 0; position < used; position++) {
        int64_t pair = j->order[position], token = pair / j->slots;
        j->by_expert[token * j->slots + j->num_used[token]++] = pair;
    }
}

/* The sorted pairs, and the segments of every expert. `ends` [experts + 1] is scratch. */
static int plan(job *j, int64_t *ends) {
    int64_t segment_rows = SEGMENT_BYTES / (j->x_panel / VL + 1) / VL * VL;
    segment_rows = least(segment_rows < VL ? VL : segment_rows, SEGMENT_PANELS * VL);
    int status = sort_pairs(j, 0, j->tokens, ends);
    if (status != FINE) return status;
    for (int64_t e = 0; e < j->experts; e++) {
        int64_t first = e ? ends[e - 1] : 0, count = ends[e] - first;
        int64_t parts = (count + segment_rows - 1) / segment_rows;
        int64_t part = parts ? round_up((count + parts - 1) / parts, VL) : 0;
        for (int64_t done = 0; done < count; done += part) {
            segment *s = j->segments + j->num_segments;
            int64_t rows = least(count - done, part), over = rows % VL;
            *s = (segment){.expert = e, .first = first + done, .panel = j->num_panels, .row = j->num_rows};
            s->rows = j->in_blocks ? rows : over <= ROWS_MAX ? over : 0;
            s->panel_rows = rows - s->rows;
            s->panels = (s->panel_rows + VL - 1) / VL;
            for (int64_t p = 0; p < s->panels; p++) j->panel_segment[j->num_panels + p] = j->num_segments;
            j->num_panels += s->panels;
            j->num_rows += s->rows;
            j->num_segments++;
        }
    }
    if (j->in_blocks) list_by_expert(j, ends[j->experts]);
    return FINE;
}

static int run(job *j, int64_t threads, int64_t poison, parallel_function parallel) {
    int64_t size = j->bf16 ? 2 : 4, pairs = j->tokens * j->slots;
    j->x_panel = (j->inner * size + 3) / 4 * 4 * VL;
    j->hidden_panel = (j->width * size + 3) / 4 * 4 * VL;
    j->hidden_row = round_up(j->width * size, 64);
    j->whole_rows = j->in_blocks ? SEGMENT_PANELS * VL : ROWS_MAX;
    /* Every part but the last of an expert holds at least VL rows. */
    int64_t most = least(pairs, j->experts + pairs / VL) + 1;
    int64_t list_bytes = round_up(pairs * 8, 64) + round_up((j->experts + 1) * 8, 64) +
                         round_up(most * (int64_t)sizeof(segment), 64) + 2 * round_up(most * 8, 64) +
                         (j->in_blocks ? round_up(pairs * 8, 64) + round_up(j->tokens * 8, 64) : 0);
    char *lists = malloc((size_t)list_bytes), *at = lists;
    if (!lists) return NO_MEMORY;
    j->order = (int64_t *)cut(&at, pairs * 8);
    int64_t *ends = (int64_t *)cut(&at, (j->experts + 1) * 8);
    j->segments = (segment *)cut(&at, most * (int64_t)sizeof(segment));
    j->panel_segment = (int64_t *)cut(&at, most * 8);
    j->largest_first = (int64_t *)cut(&at, most * 8);
    if (j->in_blocks) j->by_expert = (int64_t *)cut(&at, pairs * 8), j->num_used = (int64_t *)cut(&at, j->tokens * 8);
    int status = plan(j, ends);
    j->takers = threads;
    j->whole = divides_well(j, threads);
    if (j->whole) sort_segments(j);
    int64_t panels = j->whole && !j->in_blocks ? SEGMENT_PANELS * threads : j->num_panels;
    int64_t rows = j->whole ? j->whole_rows * threads : j->num_rows;
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
        j->tasks[1] = j->num_segments * up_blocks(j);
        j->tasks[2] = j->num_segments * down_blocks(j);
        j->tasks[3] = (j->tokens + TOKENS - 1) / TOKENS;
        if (threads > 1 && j->barrier) parallel(work, j, (unsigned)threads, 0);
        else if (threads > 1) work_in_phases(j, (unsigned)threads, parallel);
        else work(j);
    }
    give_back(scratch);
    free(lists);
    return status;
}

static matrix matrix_at(const int64_t *a) {
    return (matrix){(const char *)(intptr_t)a[0], a[1], a[2], (const char *)(intptr_t)a[3], a[4]};
}

#define NUMBERS 51

/* `a` [NUMBERS] is what sparsify/cpu/kernel.py packs, in the same order; pointers are numbers, strides count bytes. */
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
        .in_blocks = a[32],
        .y_bias = (const float *)(intptr_t)a[33],
        .y_added = (const float *)(intptr_t)a[34],
        .up_source = matrix_at(a + 35),
        .gate_source = matrix_at(a + 40),
        .down_source = matrix_at(a + 45),
        .up_in_rows = a[50],
    };
    if (j.up_in_rows) j.up_source.data = j.gate_source.data = NULL; /* they are their own source */
    if (goes_by_tokens(&j, a[13])) return run_by_tokens(&j, a[13], a[14], (parallel_function)(intptr_t)a[15]);
    int64_t chunk = j.experts * SEGMENT_PANELS * VL;
    /* Each chunk reads all weights again: larger ones where their results stay small. */
    if (2 * chunk * j.outputs * (int64_t)sizeof(float) <= KEPT_BYTES) chunk *= 2;
    chunk = round_up((chunk > CHUNK_PAIRS ? chunk : CHUNK_PAIRS) / j.slots + 1, TOKENS);
    int64_t size = j.bf16 ? 2 : 4;
    for (int64_t first = 0; first < a[5]; first += chunk) {
        job part = j;
        part.tokens = least(a[5] - first, chunk);
        part.x += first * j.x_row;
        if (part.routing) part.routing += first * j.slots;
        part.ids += first * j.slots;
        part.y += first * j.outputs * size;
        if (part.y_added) part.y_added += first * j.outputs;
        int status = run(&part, a[13], a[14], (parallel_function)(intptr_t)a[15]);
        if (status != FINE) return status;
    }
    return FINE;
}

#include "backward.h"

#include "route.h"

#include "onnx_api.h"

#include "onnx_moe.h"

#include "onnx_route.h"
