/* The op ai.sparsify::MoE for onnxruntime on the CPU.

     x [T, D], expert_ids [T, K] int64, routing_weights [T, K] or none for ones,
     up_proj [E, B, D, b] or [E, M, D], up_bias [E, M] or none, gate_proj, gate_bias likewise or none,
     down_proj [E, C, M, c], down_bias [E, N] or none, bias [N] or none, added [T, N] or none
       ->  y [T, N], with what is added to the sum;
     all but the ids in fp32, expert_ids in [-1, E), -1 for an unused slot

   Weights lie in blocks: neuron n is [:, n / b, :, n % b], and the last block may have more than are needed. N is C * c
   where there is no down_bias. up_proj and gate_proj of up to MOST_IN_ROWS neurons lie in blocks or as they are. */

enum { X, IDS, ROUTING, UP, UP_BIAS, GATE, GATE_BIAS, DOWN, DOWN_BIAS, BIAS, ADDED, INPUTS };

typedef struct {
    ort_api api;
    int64_t activation;
} moe_kernel;

static int64_t outputs_of(const onnx_tensor t[INPUTS]) {
    return t[DOWN_BIAS].rank ? t[DOWN_BIAS].dims[1] : t[DOWN].dims[1] * t[DOWN].dims[3];
}

static int is_projection(const onnx_tensor *t, int64_t experts, int64_t inputs, int64_t outputs) {
    return has_blocks(t, experts, inputs, outputs) || has_rows(t, experts, inputs, outputs);
}

static const char *wrong_shape(const onnx_tensor t[INPUTS]) {
    int64_t tokens = t[X].dims[0], inner = t[X].dims[1], slots = t[IDS].dims[1];
    int64_t experts = t[UP].dims[0], width = t[DOWN].dims[2], outputs = outputs_of(t);
    if (t[X].rank != 2) return "x must be [T, D]";
    if (!is_matrix(t + IDS, tokens, slots)) return "expert_ids must be [T, K]";
    if (!may_be_matrix(t + ROUTING, tokens, slots)) return "routing_weights must be [T, K]";
    if (!is_projection(t + UP, experts, inner, width) || !may_be_matrix(t + UP_BIAS, experts, width))
        return "up_proj must be [E, B, D, b], or [E, M, D] for few neurons, its bias [E, M]";
    int alike = t[GATE].rank == t[UP].rank && !memcmp(t[GATE].dims, t[UP].dims, sizeof t[UP].dims);
    if ((t[GATE].rank && !alike) || !may_be_matrix(t + GATE_BIAS, experts, width))
        return "gate_proj must be [E, B, D, b] or [E, M, D] as up_proj, its bias [E, M]";
    if (!has_blocks(t + DOWN, experts, width, outputs) || !may_be_matrix(t + DOWN_BIAS, experts, outputs))
        return "down_proj must be [E, C, M, c], its bias [E, N]";
    if (t[BIAS].rank && (t[BIAS].rank != 1 || t[BIAS].dims[0] != outputs)) return "bias must be [N]";
    if (!may_be_matrix(t + ADDED, tokens, outputs)) return "added must be [T, N]";
    return NULL;
}

static void *moe_compute(void *kernel, void *context) {
    const moe_kernel *own = kernel;
    ort_api api = own->api;
    onnx_tensor t[INPUTS] = {0};
    void *status = read_tensors(api, context, t, INPUTS), *y = NULL;
    if (status) return status;
    const char *wrong = wrong_shape(t);
    if (wrong) return refuse(api, INVALID_ARGUMENT, wrong);
    int64_t shape[2] = {t[X].dims[0], outputs_of(t)};
    status = make_output(api, context, shape, &y);
    if (status) return status;
    int64_t slots = t[IDS].dims[1], width = t[DOWN].dims[2];
    int64_t operations = shape[0] * slots * width * (t[X].dims[1] + shape[1]);
    int64_t a[NUMBERS] = {
        address(t[X].data), t[X].dims[1] * 4, address(t[ROUTING].data), address(t[IDS].data), address(y),
        shape[0], t[X].dims[1], width, shape[1], t[UP].dims[0], slots,
        own->activation, 0, workers_for(operations), 0, address((const void *)onnx_parallel), 0,
    };
    put_matrix(a + 17, t + UP, t + UP_BIAS);
    put_matrix(a + 22, t + GATE, t + GATE_BIAS);
    put_matrix(a + 27, t + DOWN, t + DOWN_BIAS);
    a[32] = 1; /* in blocks */
    a[33] = address(t[BIAS].data), a[34] = address(t[ADDED].data);
    a[50] = t[UP].rank == 3;
    calling.api = api, calling.context = context;
    int found = sparsify_moe_ffn(a);
    if (found == BAD_EXPERT) return refuse(api, INVALID_ARGUMENT, "an expert id is not in [-1, E)");
    return found == FINE ? NULL : refuse(api, FAIL, "no memory for the hidden values");
}

static void *moe_create(const ort_op *op, ort_api api, const void *info, void **kernel) {
    static const char *const names[] = {"relu", "squared_relu", "gelu", "gelu_tanh", "silu"}; /* as in activations.h */
    char name[32] = {0};
    size_t size = sizeof name;
    (void)op;
    void *status =
        ((void *(*)(const void *, const char *, char *, size_t *))api[STRING_ATTRIBUTE])(info, "activation", name, &size);
    if (status) return status;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(name, names[i])) continue;
        moe_kernel *made = malloc(sizeof *made);
        if (!made) return refuse(api, FAIL, "no memory for a kernel");
        *made = (moe_kernel){api, (int64_t)i};
        *kernel = made;
        return NULL;
    }
    return refuse(api, INVALID_ARGUMENT, "activation must be relu, squared_relu, gelu, gelu_tanh or silu");
}

static const char *moe_name(const ort_op *op) {
    (void)op;
    return "MoE";
}

static int moe_input_type(const ort_op *op, size_t index) {
    (void)op;
    return index == IDS ? INT64 : FLOAT;
}

static int moe_output_type(const ort_op *op, size_t index) {
    (void)op, (void)index;
    return FLOAT;
}

static size_t moe_inputs(const ort_op *op) {
    (void)op;
    return INPUTS;
}

static int moe_input_kind(const ort_op *op, size_t index) {
    (void)op;
    return index == X || index == IDS || index == UP || index == DOWN ? REQUIRED : OPTIONAL;
}

static const ort_op moe_op = CPU_OP(moe);
