/* Narrow experts in blocks and many tokens: a task is some tokens, to whose rows of y one thread adds all experts, one
   after another. Weights are read anew for each task, but the outputs of pairs are neither kept nor summed afterwards,
   which takes as long as all products of narrow experts. */

#define NARROW INPUTS_AT_ONCE /* neurons of an expert; with more of them outputs are few beside the products */
#define ROWS_AT_ONCE 8        /* of an expert in a task, on average, that reading its weights is worth */
#define MOST_TOKENS 128       /* of a task: their rows of x and y stay in the cache of a core */

static int64_t tokens_at_least(const job *j) {
    return 1 + ROWS_AT_ONCE * j->experts / (j->slots ? j->slots : 1);
}

static int goes_by_tokens(const job *j, int64_t threads) {
    return j->in_blocks && j->width <= NARROW && j->tokens >= threads * tokens_at_least(j);
}

static void start_row(const job *j, int64_t token) {
    for (int64_t n = 0; n < j->outputs; n += VL) {
        int64_t columns = least(j->outputs - n, VL);
        store_part((float *)j->y + token * j->outputs + n, start_of_sum(j, token, n, columns), columns * 4);
    }
}

/* The pairs of an expert in a task. */
static segment rows_of_expert(int64_t expert, const int64_t *ends) {
    int64_t first = expert ? ends[expert - 1] : 0;
    return (segment){.expert = expert, .first = first, .row = first, .rows = ends[expert] - first};
}

static void down_passing(const job *j, const segment *s, int64_t number) {
    int64_t width = j->down.row / 4, first = number * width;
    passing r = {
        .hidden = (const float *)(j->hidden_rows + s->row * j->hidden_row),
        .hidden_row = j->hidden_row / 4,
        .rows = s->rows,
        .places = j->tokens_in_order + s->first,
        .scales = j->weights_in_order + s->first,
        .z = (float *)j->y + first,
        .z_row = j->outputs,
    };
    const float *w = (const float *)block_at(&j->down, s->expert, number, j->width);
    pass_block(&r, w, width, bias_of(&j->down, s->expert, first), least(j->outputs - first, width), j->after);
}

static void list_in_order(job *j, int64_t pairs) {
    for (int64_t p = 0; p < pairs; p++) {
        j->tokens_in_order[p] = j->order[p] / j->slots;
        j->weights_in_order[p] = weight_of(j, j->order[p]);
    }
}

/* Hidden values of all experts, then one block of outputs after another, whose part of y stays in the nearest cache. */
static void all_experts(job *j, const int64_t *ends) {
    int few = j->width == FEW_INPUTS;
    j->takers = 1;
    for (int64_t e = 0; e < j->experts; e++) {
        segment s = rows_of_expert(e, ends);
        j->after = e + 1 < j->experts ? block_at(&j->up, e + 1, 0, j->inner) : NULL;
        for (int64_t b = 0; s.rows && b < up_blocks(j); b++) up_block(j, &s, b);
    }
    if (few) list_in_order(j, ends[j->experts - 1]);
    j->takers = down_blocks(j); /* what follows a block is that of the next expert */
    for (int64_t b = 0; b < down_blocks(j); b++)
        for (int64_t e = 0; e < j->experts; e++) {
            segment s = rows_of_expert(e, ends);
            j->after = e + 1 < j->experts ? block_at(&j->down, e + 1, b, j->width) : NULL;
            if (s.rows && few) down_passing(j, &s, b);
            else if (s.rows) down_block(j, &s, b);
        }
}

static void take_tokens(void *data) {
    job *shared = data, j = *shared;
    int64_t thread = __atomic_fetch_add(&shared->arrived, 1, __ATOMIC_RELAXED);
    int64_t *ends = shared->ends + thread * (j.experts + 1), task;
    j.order = shared->order + thread * j.tokens_of_task * j.slots;
    j.hidden_rows = shared->hidden_rows + thread * j.tokens_of_task * j.slots * j.hidden_row;
    j.tokens_in_order = shared->tokens_in_order + thread * j.tokens_of_task * j.slots;
    j.weights_in_order = shared->weights_in_order + thread * j.tokens_of_task * j.slots;
    j.by_tokens = 1;
    while ((task = __atomic_fetch_add(&shared->next[0], 1, __ATOMIC_RELAXED)) < j.tasks[0]) {
        int64_t first = task * j.tokens_of_task, last = least(first + j.tokens_of_task, j.tokens);
        for (int64_t t = first; t < last; t++) start_row(&j, t);
        int status = sort_pairs(&j, first, last, ends);
        if (status != FINE) {
            __atomic_store_n(&shared->status, status, __ATOMIC_RELAXED);
            continue;
        }
        all_experts(&j, ends);
    }
}

static int run_by_tokens(job *j, int64_t threads, int64_t poison, parallel_function parallel) {
    int64_t most_tasks = j->tokens / tokens_at_least(j);
    int64_t tasks = least(round_up(parts_of(j->tokens, MOST_TOKENS), threads), most_tasks);
    j->tokens_of_task = parts_of(j->tokens, tasks);
    j->tasks[0] = parts_of(j->tokens, j->tokens_of_task);
    j->hidden_row = round_up(j->width * 4, 64);
    int64_t pairs = threads * j->tokens_of_task * j->slots; /* a token may name one expert in each of its slots */
    int64_t ends_bytes = threads * (j->experts + 1) * 8, hidden_bytes = pairs * j->hidden_row;
    int64_t bytes = hidden_bytes + 2 * round_up(pairs * 8, 64) + round_up(pairs * 4, 64) + round_up(ends_bytes, 64);
    char *scratch = take(64 + bytes); /* 64 for its size */
    if (!scratch) return NO_MEMORY;
    char *at = scratch + 64;
    j->hidden_rows = cut(&at, hidden_bytes);
    j->order = (int64_t *)cut(&at, pairs * 8);
    j->ends = (int64_t *)cut(&at, ends_bytes);
    j->tokens_in_order = (int64_t *)cut(&at, pairs * 8);
    j->weights_in_order = (float *)cut(&at, pairs * 4);
    if (poison) memset(j->hidden_rows, 0xff, (size_t)hidden_bytes);
    if (threads > 1) parallel(take_tokens, j, (unsigned)threads, 0);
    else take_tokens(j);
    give_back(scratch);
    return (int)j->status;
}
