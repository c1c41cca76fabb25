/* z = a w^T for COLUMNS rows of w at a time, in two forms. w is read where it lies, row-major.

   rows:   few rows of a, row-major. Vectors run along the inner dimension, the lanes are summed at the end.
   panels: many rows of a, transposed in panels [inner][VL]: a lane is a row of a, w is broadcast. Packing a costs less
           than packing w, and z comes out transposed, which is how the next product wants it.

   The inner dimension counts elements; a row of bf16 is read as pairs, with a last odd one alone. */

#define COLUMNS 48 /* a multiple of TILE_COLUMNS and of VL */
#define AHEAD 8192 /* bytes between what is computed and what is fetched */
#define LINE 64

INLINE uint32_t load_word(const char *from) {
    uint32_t word;
    memcpy(&word, from, 4);
    return word;
}

INLINE uint32_t load_half(const char *from) {
    uint16_t half;
    memcpy(&half, from, 2);
    return half;
}

/* What is fetched for later tiles, while w is read for the first time: for every vector of a tile's rows a line each,
   `apart` from each other, and `step` further each time. Where the rows follow each other in memory, so do the lines: a
   plain sweep reaches nearly twice the bandwidth of several rows at a time. */
typedef struct {
    const char *at;
    int64_t apart, step;
} prefetch;

INLINE prefetch prefetch_after(const char *w, int64_t stride, int64_t row, int64_t rows) {
    int64_t ahead = (AHEAD + rows * row - 1) / (rows * row) * rows * stride;
    if (stride == row) return (prefetch){w + ahead, LINE, rows * LINE};
    return (prefetch){w + ahead, stride, LINE};
}

/* rows <= TILE_ROWS by 4 columns, to z [rows][z_row]. */
INLINE void tile_rows(const char *const *a, const char *const *w, int64_t inner, int bf16, int rows, prefetch next,
                      float *z, int64_t z_row) {
    vf acc[TILE_ROWS][4];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < 4; j++) acc[i][j] = splat(0.0f);
    int64_t bytes = inner * (bf16 ? 2 : 4), whole = bytes & ~(int64_t)(VL * 4 - 1);
    for (int64_t at = 0; at < whole; at += VL * 4) {
        vu column[4];
        UNROLL
        for (int j = 0; j < 4; j++) {
            column[j] = load(w[j] + at);
            if (next.at && at % LINE == 0) __builtin_prefetch(next.at + j * next.apart);
        }
        if (next.at && at % LINE == 0) next.at += next.step;
        UNROLL
        for (int i = 0; i < rows; i++) {
            vu row = load(a[i] + at);
            UNROLL
            for (int j = 0; j < 4; j++) acc[i][j] = multiply_add(acc[i][j], row, column[j], bf16);
        }
    }
    if (whole < bytes) {
        vu column[4];
        UNROLL
        for (int j = 0; j < 4; j++) column[j] = load_part(w[j] + whole, bytes - whole);
        UNROLL
        for (int i = 0; i < rows; i++) {
            vu row = load_part(a[i] + whole, bytes - whole);
            UNROLL
            for (int j = 0; j < 4; j++) acc[i][j] = multiply_add(acc[i][j], row, column[j], bf16);
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        vf sums = sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
        memcpy(z + i * z_row, &sums, 16);
    }
}

/* rows of a by columns <= z_row rows of w, `stride` bytes apart, to z [rows][z_row], four columns at a time. */
INLINE void rows_any(const char *const *a, int64_t rows, const char *w, int64_t stride, int64_t columns, int64_t inner,
                     int bf16, float *z, int64_t z_row) {
    const prefetch none = {NULL, 0, 0};
    for (int64_t n = 0; n < columns; n += 4) {
        const char *four[4];
        const prefetch next = inner ? prefetch_after(w + n * stride, stride, inner * (bf16 ? 2 : 4), 4) : none;
        for (int j = 0; j < 4; j++) four[j] = w + (n + j < columns ? n + j : columns - 1) * stride;
        for (int64_t i = 0; i < rows;) {
            int64_t left = rows - i;
            float *to = z + i * z_row + n;
            if (left >= TILE_ROWS) {
                tile_rows(a + i, four, inner, bf16, TILE_ROWS, i ? none : next, to, z_row);
                i += TILE_ROWS;
                continue;
            }
            switch (left) {
#if TILE_ROWS > 3
            case 5: tile_rows(a + i, four, inner, bf16, 5, i ? none : next, to, z_row); break;
            case 4: tile_rows(a + i, four, inner, bf16, 4, i ? none : next, to, z_row); break;
            case 3: tile_rows(a + i, four, inner, bf16, 3, i ? none : next, to, z_row); break;
#endif
            case 2: tile_rows(a + i, four, inner, bf16, 2, i ? none : next, to, z_row); break;
            default: tile_rows(a + i, four, inner, bf16, 1, i ? none : next, to, z_row);
            }
            i += left;
        }
    }
}

/* columns (TILE_COLUMNS, 4 or 1) by panels <= TILE_PANELS. */
INLINE void tile_panels(const char *a, int64_t panel, const char *w, int64_t stride, int64_t inner, int bf16,
                        int columns, int panels, int fetch, float *z) {
    vf acc[TILE_COLUMNS][TILE_PANELS];
    const char *base[TILE_COLUMNS / 4]; /* three strides from each are all the addresses a tile needs */
    int64_t thrice = 3 * stride, words = bf16 ? inner / 2 : inner;
    UNROLL
    for (int j = 0; j < columns; j++)
        UNROLL
        for (int p = 0; p < panels; p++) acc[j][p] = splat(0.0f);
    UNROLL
    for (int g = 0; g < TILE_COLUMNS / 4; g++) base[g] = w + g * 4 * stride;
    prefetch next = {NULL, 0, 0};
    if (fetch && inner) next = prefetch_after(w, stride, inner * (bf16 ? 2 : 4), columns);
    for (int64_t done = 0, end; done < words; done = end) {
        end = done + LINE / 4 < words ? done + LINE / 4 : words;
        if (next.at) {
            UNROLL
            for (int j = 0; j < columns; j++) __builtin_prefetch(next.at + j * next.apart);
            next.at += next.step;
        }
        UNROLL_4
        for (int64_t u = done; u < end; u++) {
            vu row[TILE_PANELS];
            UNROLL
            for (int p = 0; p < panels; p++) row[p] = load(a + p * panel);
            UNROLL
            for (int j = 0; j < columns; j++) {
                const char *at = base[j / 4] + (j % 4 == 3 ? thrice : j % 4 * stride);
                vu one = (vu){0} + load_word(at);
                UNROLL
                for (int p = 0; p < panels; p++) acc[j][p] = multiply_add(acc[j][p], row[p], one, bf16);
            }
            a += VL * 4;
            UNROLL
            for (int g = 0; g < TILE_COLUMNS / 4; g++) base[g] += 4;
        }
    }
    if (bf16 && inner % 2) {
        UNROLL
        for (int j = 0; j < columns; j++) {
            vu one = (vu){0} + load_half(base[j / 4] + j % 4 * stride);
            UNROLL
            for (int p = 0; p < panels; p++) acc[j][p] = multiply_add(acc[j][p], load(a + p * panel), one, bf16);
        }
    }
    UNROLL
    for (int j = 0; j < columns; j++)
        UNROLL
        for (int p = 0; p < panels; p++) storef(z + (j * panels + p) * VL, acc[j][p]);
}

INLINE void panels_any(const char *a, int64_t panel, const char *w, int64_t stride, int64_t columns, int64_t inner,
                       int bf16, int panels, int fetch, float *z) {
    int64_t n = 0;
    for (; n + TILE_COLUMNS <= columns; n += TILE_COLUMNS)
        tile_panels(a, panel, w + n * stride, stride, inner, bf16, TILE_COLUMNS, panels, fetch, z + n * panels * VL);
    for (; n + 4 <= columns; n += 4)
        tile_panels(a, panel, w + n * stride, stride, inner, bf16, 4, panels, fetch, z + n * panels * VL);
    for (; n < columns; n++)
        tile_panels(a, panel, w + n * stride, stride, inner, bf16, 1, panels, fetch, z + n * panels * VL);
}

static void product_rows(const char *const *a, int64_t rows, const char *w, int64_t stride, int64_t columns,
                         int64_t inner, int bf16, float *z, int64_t z_row) {
    if (bf16) rows_any(a, rows, w, stride, columns, inner, 1, z, z_row);
    else rows_any(a, rows, w, stride, columns, inner, 0, z, z_row);
}

/* `panels` panels, `panel` bytes apart, by columns <= COLUMNS rows of w, to z [columns][panels][VL]. */
static void product_panels(const char *a, int64_t panel, const char *w, int64_t stride, int64_t columns, int64_t inner,
                           int bf16, int64_t panels, int fetch, float *z) {
    if (bf16) {
        if (panels == 1) panels_any(a, panel, w, stride, columns, inner, 1, 1, fetch, z);
        else if (panels == 2) panels_any(a, panel, w, stride, columns, inner, 1, 2, fetch, z);
#if TILE_PANELS > 2
        else panels_any(a, panel, w, stride, columns, inner, 1, 3, fetch, z);
#endif
        return;
    }
    if (panels == 1) panels_any(a, panel, w, stride, columns, inner, 0, 1, fetch, z);
    else if (panels == 2) panels_any(a, panel, w, stride, columns, inner, 0, 2, fetch, z);
#if TILE_PANELS > 2
    else panels_any(a, panel, w, stride, columns, inner, 0, 3, fetch, z);
#endif
}
