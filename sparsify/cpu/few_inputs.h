/* down of experts with FEW_INPUTS neurons, in blocks: the weights of a vector or two of outputs stay in registers while the
   rows pass by. A tile of rows would begin and end more often than it multiplies. */

/* The rows of one expert that are added to z. */
typedef struct {
    const float *hidden; /* [rows], hidden_row apart, FEW_INPUTS values each */
    int64_t hidden_row, rows;
    const int64_t *places; /* the row of z of each */
    const float *scales;   /* of the bias for each, where there is one */
    float *z;
    int64_t z_row;
} passing;

/* z += scale bias + hidden w for vectors <= FEW_VECTORS of outputs, the last with `last` lanes. In the order of tile_outputs,
   so that the bits are the same. */
INLINE void pass_rows(const passing *r, const float *w, int64_t width, const float *bias, int64_t first, int vectors,
                      int64_t last, int biased, const char *next) {
    vf weight[FEW_INPUTS][FEW_VECTORS], start[FEW_VECTORS];
    UNROLL
    for (int v = 0; v < vectors; v++) {
        int64_t lanes = v < vectors - 1 ? VL : last;
        start[v] = biased ? (vf)load_words(bias + first + v * VL, lanes) : splat(0.0f);
        UNROLL
        for (int i = 0; i < FEW_INPUTS; i++) weight[i][v] = (vf)load_words(w + i * width + first + v * VL, lanes);
    }
    const float *hidden = r->hidden;
    for (int64_t p = 0; p < r->rows; p++, hidden += r->hidden_row) {
        float *z = r->z + r->places[p] * r->z_row + first;
        vf acc[FEW_VECTORS];
        __builtin_prefetch(next + p * LINE);
        UNROLL
        for (int v = 0; v < vectors; v++) {
            acc[v] = biased ? splat(r->scales[p]) * start[v] : start[v];
            if (biased) ROUNDED(acc[v]);
        }
        UNROLL
        for (int i = 0; i < FEW_INPUTS; i++) {
            vf value = splat(hidden[i]);
            UNROLL
            for (int v = 0; v < vectors; v++) acc[v] += value * weight[i][v];
        }
        UNROLL
        for (int v = 0; v < vectors; v++) {
            int64_t lanes = v < vectors - 1 ? VL : last;
            acc[v] += (vf)load_words(z + v * VL, lanes);
            store_part(z + v * VL, acc[v], lanes * 4);
        }
    }
}

INLINE void pass_all(const passing *r, const float *w, int64_t width, const float *bias, int64_t outputs, int biased,
                     const char *next) {
    int64_t n = 0;
    for (; n + FEW_VECTORS * VL <= outputs; n += FEW_VECTORS * VL, next += r->rows * LINE)
        pass_rows(r, w, width, bias, n, FEW_VECTORS, VL, biased, next);
    for (; n + VL <= outputs; n += VL) pass_rows(r, w, width, bias, n, 1, VL, biased, next);
    if (n < outputs) pass_rows(r, w, width, bias, n, 1, outputs - n, biased, next);
}

/* All outputs of a block, `width` apart from one input to the next; `bias` may be NULL. */
static void pass_block(const passing *r, const float *w, int64_t width, const float *bias, int64_t outputs,
                       const char *next) {
    if (bias) pass_all(r, w, width, bias, outputs, 1, next);
    else pass_all(r, w, width, NULL, outputs, 0, next);
}
