/* The op ai.sparsify::Route for onnxruntime on the CPU: a router that takes the largest logits of a perceptron.

     x [T, D], hidden [1, B, D, b], hidden_bias [1, H] or none, output [1, C, H, c], output_bias [1, E] or none
       ->  expert_ids [T, top_k] int64, the largest of output(relu(hidden(x))) first, of equal ones the first

   Weights lie in blocks, as those of MoE do. H and E are those of the biases, without them B * b and C * c. */

enum { TOKENS_IN, HIDDEN, HIDDEN_BIAS, LAST, LAST_BIAS, ROUTE_INPUTS };

typedef struct {
    ort_api api;
    int64_t top_k;
} route_kernel;

static int64_t rows_with(const onnx_tensor *weight, const onnx_tensor *bias) {
    return bias->rank ? bias->dims[1] : weight->dims[1] * weight->dims[3];
}

static const char *wrong_route(const onnx_tensor t[ROUTE_INPUTS], int64_t top_k) {
    int64_t neurons = rows_with(t + HIDDEN, t + HIDDEN_BIAS), experts = rows_with(t + LAST, t + LAST_BIAS);
    if (t[TOKENS_IN].rank != 2) return "x must be [T, D]";
    if (!has_blocks(t + HIDDEN, 1, t[TOKENS_IN].dims[1], neurons) || !may_be_matrix(t + HIDDEN_BIAS, 1, neurons))
        return "hidden must be [1, B, D, b], its bias [1, H]";
    if (!has_blocks(t + LAST, 1, neurons, experts) || !may_be_matrix(t + LAST_BIAS, 1, experts))
        return "output must be [1, C, H, c], its bias [1, E]";
    return top_k > experts ? "top_k must be at most E" : NULL;
}

static void *route_compute(void *kernel, void *context) {
    const route_kernel *own = kernel;
    ort_api api = own->api;
    onnx_tensor t[ROUTE_INPUTS] = {0};
    void *status = read_tensors(api, context, t, ROUTE_INPUTS), *ids = NULL;
    if (status) return status;
    const char *wrong = wrong_route(t, own->top_k);
    if (wrong) return refuse(api, INVALID_ARGUMENT, wrong);
    int64_t shape[2] = {t[TOKENS_IN].dims[0], own->top_k};
    status = make_output(api, context, shape, &ids);
    if (status) return status;
    route r = {
        .x = (const float *)t[TOKENS_IN].data,
        .tokens = shape[0],
        .inner = t[TOKENS_IN].dims[1],
        .neurons = rows_with(t + HIDDEN, t + HIDDEN_BIAS),
        .experts = rows_with(t + LAST, t + LAST_BIAS),
        .top_k = own->top_k,
        .ids = ids,
    };
    int64_t a[10];
    put_matrix(a, t + HIDDEN, t + HIDDEN_BIAS);
    put_matrix(a + 5, t + LAST, t + LAST_BIAS);
    r.hidden = matrix_at(a), r.output = matrix_at(a + 5);
    calling.api = api, calling.context = context;
    int64_t workers = workers_for(r.tokens * r.neurons * (r.inner + r.experts));
    return run_route(&r, workers, onnx_parallel) == FINE ? NULL : refuse(api, FAIL, "no memory for the logits");
}

static void *route_create(const ort_op *op, ort_api api, const void *info, void **kernel) {
    int64_t top_k = 0;
    (void)op;
    void *status = ((void *(*)(const void *, const char *, int64_t *))api[INT_ATTRIBUTE])(info, "top_k", &top_k);
    if (status) return status;
    if (top_k < 1) return refuse(api, INVALID_ARGUMENT, "top_k must be at least 1");
    route_kernel *made = malloc(sizeof *made);
    if (!made) return refuse(api, FAIL, "no memory for a kernel");
    *made = (route_kernel){api, top_k};
    *kernel = made;
    return NULL;
}

static const char *route_name(const ort_op *op) {
    (void)op;
    return "Route";
}

static int route_input_type(const ort_op *op, size_t index) {
    (void)op, (void)index;
    return FLOAT;
}

static int route_output_type(const ort_op *op, size_t index) {
    (void)op, (void)index;
    return INT64;
}

static size_t route_inputs(const ort_op *op) {
    (void)op;
    return ROUTE_INPUTS;
}

static int route_input_kind(const ort_op *op, size_t index) {
    (void)op;
    return index == HIDDEN_BIAS || index == LAST_BIAS ? OPTIONAL : REQUIRED;
}

static const ort_op route_op = CPU_OP(route);

/* What onnxruntime calls when the library is registered; a status, or NULL. */
void *RegisterCustomOps(void *options, const ort_base *base) {
    ort_api api = base->api(API_VERSION);
    void *domain = NULL; /* kept: sessions refer to it */
    if (!api) return NULL;
    void *(*add)(void *, const ort_op *) = (void *(*)(void *, const ort_op *))api[DOMAIN_ADD];
    void *status = ((void *(*)(const char *, void **))api[CREATE_DOMAIN])("ai.sparsify", &domain);
    if (!status) status = add(domain, &moe_op);
    if (!status) status = add(domain, &route_op);
    if (!status) status = ((void *(*)(void *, void *))api[ADD_DOMAIN])(options, domain);
    return status;
}
