/* What the phases share: the layer, the pairs sorted by expert, and the scratch memory. */

#define PHASES 4
#define TOKENS 8
#define ROWS_MAX (VL * 3 / 4)    /* so many rows left over are cheaper as they are than as a panel with empty lanes */
#define SEGMENT_BYTES (512 << 10) /* packed rows of a segment: half of a usual L2 cache */
#define SEGMENT_PANELS 8
#define CHUNK_PAIRS 2048    /* so many pairs at a time, or once or twice SEGMENT_PANELS panels for each expert: bounds the memory */
#define FAIR_SHARE 3        /* segments of the largest size for each thread: then they are shared out evenly enough */
#define KEPT_BYTES (64 << 20)

enum { FINE, BAD_EXPERT, NO_MEMORY, STALE };

typedef struct {
    const char *data;
    int64_t expert; /* bytes from one expert to the next */
    int64_t row;    /* bytes from one output to the next; in blocks, from one input to the next */
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
    const float *routing; /* NULL: each weighs one */
    const int64_t *ids;
    const float *y_bias, *y_added; /* what y begins with, [outputs] and [tokens][outputs], or NULL; fp32 alone */
    matrix up, gate, down;
    matrix up_source, gate_source, down_source; /* what the blocks are a copy of, or without data */
    char *y;
    int64_t tokens, inner, width, outputs, experts, slots, activation, bf16, in_blocks;
    int64_t up_in_rows; /* beside blocks: up and gate of experts with few neurons lie as they are */
    void (*barrier)(void);
    int64_t *order;                /* sorted position -> pair */
    int64_t *by_expert, *num_used; /* in blocks: the pairs of each token by expert [tokens][slots], and how many */
    segment *segments;
    int64_t *panel_segment, *largest_first;
    int64_t num_segments, num_panels, num_rows, whole_rows; /* whole_rows: outside of panels, of one segment at most */
    int64_t x_panel, hidden_panel, hidden_row; /* bytes */
    char *packed, *hidden_panels, *hidden_rows;
    float *out; /* [pairs][outputs] */
    const char *after; /* what a thread is likely to read after the last block of a segment, or NULL */
    int64_t takers;    /* threads that share the blocks of a segment */
    int64_t by_tokens, tokens_of_task, *ends, status; /* see by_tokens.h */
    int64_t *tokens_in_order; /* of each sorted position, and its routing weight: see few_inputs.h */
    float *weights_in_order;
    int64_t whole, phase, arrived, next[PHASES], tasks[PHASES];
} job;

/* Of GOMP_parallel: runs the function in so many threads. */
typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

static float weight_of(const job *j, int64_t pair) {
    return j->routing ? j->routing[pair] : 1.0f;
}

static const char *x_of(const job *j, int64_t position) {
    return j->x + j->order[position] / j->slots * j->x_row;
}

static int64_t rows_of(const segment *s) {
    return s->panel_rows + s->rows;
}

static int64_t round_up(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Outputs of one task. */
static int64_t block_of(const job *j, const matrix *m) {
    return j->in_blocks ? m->row / 4 : COLUMNS;
}

static int64_t parts_of(int64_t whole, int64_t part) {
    return (whole + part - 1) / part;
}

static int64_t up_blocks(const job *j) {
    return j->up_in_rows ? 1 : parts_of(j->width, block_of(j, &j->up));
}

static int64_t down_blocks(const job *j) {
    return parts_of(j->outputs, block_of(j, &j->down));
}

static const char *block_at(const matrix *m, int64_t expert, int64_t number, int64_t inner) {
    return m->data + expert * m->expert + number * inner * m->row;
}

/* Whether the blocks of an expert may still be a copy: one value is compared, as writes mostly change all. */
static int may_be_copy(const matrix *blocks, const matrix *source, int64_t expert, int64_t outputs, int64_t inner) {
    if (!source->data || !outputs || !inner) return 1;
    int64_t output = outputs / 2, input = inner / 2, width = blocks->row / 4;
    const float *block = (const float *)block_at(blocks, expert, output / width, inner);
    const float *row = (const float *)(source->data + expert * source->expert + output * source->row);
    return !memcmp(block + input * width + output % width, row + input, sizeof *row);
}

static int is_stale(const job *j, int64_t expert) {
    return !may_be_copy(&j->up, &j->up_source, expert, j->width, j->inner) ||
           !may_be_copy(&j->gate, &j->gate_source, expert, j->width, j->inner) ||
           !may_be_copy(&j->down, &j->down_source, expert, j->outputs, j->width);
}

/* Counting sort of the pairs of some tokens by expert into `order`; those of e then end at ends[e], all of them at
   ends[experts]. A status: whether all ids are of experts, and these may be used. */
static int sort_pairs(job *j, int64_t first, int64_t last, int64_t *ends) {
    memset(ends, 0, (size_t)(j->experts + 1) * sizeof *ends);
    for (int64_t pair = first * j->slots; pair < last * j->slots; pair++) {
        int64_t e = j->ids[pair];
        if (e < -1 || e >= j->experts) return BAD_EXPERT;
        if (e >= 0) ends[e + 1]++;
    }
    for (int64_t e = 0; e < j->experts; e++) {
        if (ends[e + 1] && is_stale(j, e)) return STALE;
        ends[e + 1] += ends[e];
    }
    for (int64_t pair = first * j->slots; pair < last * j->slots; pair++)
        if (j->ids[pair] >= 0) j->order[ends[j->ids[pair]]++] = pair;
    return FINE;
}

INLINE float bias_at(const matrix *m, int64_t expert, int64_t column, int64_t bf16) {
    const char *row = m->bias + expert * m->bias_expert;
    if (!bf16) return ((const float *)row)[column];
    return bf16_value(((const uint16_t *)row)[column]);
}
