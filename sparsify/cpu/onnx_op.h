/* The op ai.sparsify::MoE for onnxruntime on the CPU, registered by SessionOptions.register_custom_ops_library(this).

     x [T, D], expert_ids [T, K] int64, routing_weights [T, K] or none for ones,
     up_proj [E, B, D, b], up_bias [E, M] or none, gate_proj, gate_bias likewise or none, down_proj [E, C, M, c],
     down_bias [E, N] or none, bias [N] or none, added [T, N] or none  ->  y [T, N], with what is added to the sum;
     all but the ids in fp32, expert_ids in [-1, E), -1 for an unused slot

   Weights lie in blocks: neuron n is [:, n / b, :, n % b], and the last block may have more than are needed. N is C * c
   where there is no down_bias.

   The C interface of onnxruntime is a table of functions whose order never changes: new ones are appended, by version
   (include/onnxruntime/core/session/onnxruntime_c_api.h; onnxruntime_c_api.cc asserts the last place of each version). So
   the places of the few that are called stand here, and building needs no header of onnxruntime. */
#include <unistd.h>

#define API_VERSION 17 /* the first with PARALLEL_FOR */
#define MAX_WORKERS 64
#define SMALL (1 << 18) /* operations, as in kernel.py */

enum {
    CREATE_STATUS = 0,
    CREATE_DOMAIN = 26,
    DOMAIN_ADD = 27,
    ADD_DOMAIN = 28,
    TENSOR_DATA = 51,
    COUNT_DIMENSIONS = 61,
    DIMENSIONS = 62,
    SHAPE = 65,
    STRING_ATTRIBUTE = 87,
    COUNT_INPUTS = 88,
    INPUT = 90,
    OUTPUT = 91,
    RELEASE_STATUS = 93,
    RELEASE_SHAPE = 99,
    PARALLEL_FOR = 274
};

enum { FLOAT = 1, INT64 = 7 };        /* ONNXTensorElementDataType */
enum { REQUIRED = 0, OPTIONAL = 1 };  /* OrtCustomOpInputOutputCharacteristic */
enum { FAIL = 1, INVALID_ARGUMENT = 2 }; /* OrtErrorCode */
enum { X, IDS, ROUTING, UP, UP_BIAS, GATE, GATE_BIAS, DOWN, DOWN_BIAS, BIAS, ADDED, INPUTS };

typedef void *const *ort_api;
typedef struct {
    ort_api (*api)(uint32_t version);
    const char *(*version)(void);
} ort_base;

/* OrtCustomOp, as of API_VERSION. */
typedef struct ort_op ort_op;
struct ort_op {
    uint32_t version;
    void *(*create)(const ort_op *, ort_api, const void *info);
    const char *(*name)(const ort_op *);
    const char *(*provider)(const ort_op *);
    int (*input_type)(const ort_op *, size_t);
    size_t (*inputs)(const ort_op *);
    int (*output_type)(const ort_op *, size_t);
    size_t (*outputs)(const ort_op *);
    void (*compute)(void *kernel, void *context);
    void (*destroy)(void *kernel);
    int (*input_kind)(const ort_op *, size_t);
    int (*output_kind)(const ort_op *, size_t);
    int (*input_memory)(const ort_op *, size_t);
    int (*variadic[4])(const ort_op *);
    void *(*create_v2)(const ort_op *, ort_api, const void *info, void **kernel);
    void *(*compute_v2)(void *kernel, void *context);
    void *(*infer_shape)(const ort_op *, void *);
    int (*first_version)(const ort_op *);
    int (*last_version)(const ort_op *);
};

typedef struct {
    ort_api api;
    int64_t activation;
} onnx_kernel;

typedef struct {
    const char *data; /* may be NULL where there is no element */
    int64_t dims[4], rank; /* 0 for an input that is left out */
} onnx_tensor;

typedef struct {
    void (*function)(void *);
    void *data;
} onnx_task;

/* The call that this thread is in. */
static __thread struct {
    ort_api api;
    void *context;
} calling;

static void *refuse(ort_api api, int code, const char *why) {
    return ((void *(*)(int, const char *))api[CREATE_STATUS])(code, why);
}

static void run_task(void *task, size_t worker) {
    (void)worker;
    ((onnx_task *)task)->function(((onnx_task *)task)->data);
}

static void onnx_parallel(void (*function)(void *), void *data, unsigned workers, unsigned flags) {
    (void)flags;
    ort_api api = calling.api;
    onnx_task task = {function, data};
    void *(*parallel)(void *, void (*)(void *, size_t), size_t, size_t, void *) =
        (void *(*)(void *, void (*)(void *, size_t), size_t, size_t, void *))api[PARALLEL_FOR];
    void *status = parallel(calling.context, run_task, workers, 0, &task);
    if (!status) return;
    ((void (*)(void *))api[RELEASE_STATUS])(status);
    function(data); /* takes all tasks itself */
}

/* A status, or NULL. */
static void *read_tensor(ort_api api, void *context, size_t index, onnx_tensor *to) {
    const void *value = NULL;
    void *info = NULL, *data = NULL, *status;
    size_t rank = 0;
    *to = (onnx_tensor){0};
    status = ((void *(*)(void *, size_t, const void **))api[INPUT])(context, index, &value);
    if (status || !value) return status;
    status = ((void *(*)(const void *, void **))api[SHAPE])(value, &info);
    if (status) return status;
    status = ((void *(*)(void *, size_t *))api[COUNT_DIMENSIONS])(info, &rank);
    if (!status && rank <= 4) status = ((void *(*)(void *, int64_t *, size_t))api[DIMENSIONS])(info, to->dims, rank);
    ((void (*)(void *))api[RELEASE_SHAPE])(info);
    if (status) return status;
    to->rank = (int64_t)rank;
    status = ((void *(*)(const void *, void **))api[TENSOR_DATA])(value, &data);
    to->data = data;
    return status;
}

static int is_matrix(const onnx_tensor *t, int64_t rows, int64_t columns) {
    return t->rank == 2 && t->dims[0] == rows && t->dims[1] == columns;
}

static int may_be_matrix(const onnx_tensor *t, int64_t rows, int64_t columns) {
    return !t->rank || is_matrix(t, rows, columns);
}

/* Blocks for all experts, inputs and outputs, and no block without an output. */
static int has_blocks(const onnx_tensor *t, int64_t experts, int64_t inputs, int64_t outputs) {
    int64_t blocks = t->dims[1], size = t->dims[3];
    if (t->rank != 4 || t->dims[0] != experts || t->dims[2] != inputs || size < 1) return 0;
    return blocks == parts_of(outputs, size);
}

static int64_t outputs_of(const onnx_tensor t[INPUTS]) {
    return t[DOWN_BIAS].rank ? t[DOWN_BIAS].dims[1] : t[DOWN].dims[1] * t[DOWN].dims[3];
}

static const char *wrong_shape(const onnx_tensor t[INPUTS]) {
    int64_t tokens = t[X].dims[0], inner = t[X].dims[1], slots = t[IDS].dims[1];
    int64_t experts = t[UP].dims[0], width = t[DOWN].dims[2], outputs = outputs_of(t);
    if (t[X].rank != 2) return "x must be [T, D]";
    if (!is_matrix(t + IDS, tokens, slots)) return "expert_ids must be [T, K]";
    if (!may_be_matrix(t + ROUTING, tokens, slots)) return "routing_weights must be [T, K]";
    if (!has_blocks(t + UP, experts, inner, width) || !may_be_matrix(t + UP_BIAS, experts, width))
        return "up_proj must be [E, B, D, b], its bias [E, M]";
    int same_blocks = has_blocks(t + GATE, experts, inner, width) && t[GATE].dims[3] == t[UP].dims[3];
    if ((t[GATE].rank && !same_blocks) || !may_be_matrix(t + GATE_BIAS, experts, width))
        return "gate_proj must be [E, B, D, b] like up_proj, its bias [E, M]";
    if (!has_blocks(t + DOWN, experts, width, outputs) || !may_be_matrix(t + DOWN_BIAS, experts, outputs))
        return "down_proj must be [E, C, M, c], its bias [E, N]";
    if (t[BIAS].rank && (t[BIAS].rank != 1 || t[BIAS].dims[0] != outputs)) return "bias must be [N]";
    if (!may_be_matrix(t + ADDED, tokens, outputs)) return "added must be [T, N]";
    return NULL;
}

static int64_t address(const void *pointer) {
    return (int64_t)(intptr_t)pointer;
}

static void put_matrix(int64_t *a, const onnx_tensor *weight, const onnx_tensor *bias) {
    int64_t row = weight->dims[3] * 4;
    a[0] = address(weight->data), a[1] = weight->dims[1] * weight->dims[2] * row, a[2] = row;
    a[3] = address(bias->data), a[4] = bias->dims[1] * 4;
}

/* How many threads a session has is not told: workers that are too many find no task left. */
static int64_t workers_for(int64_t operations) {
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    return operations < SMALL ? 1 : least(processors < 1 ? 1 : processors, MAX_WORKERS);
}

static void *compute(void *kernel, void *context) {
    const onnx_kernel *own = kernel;
    ort_api api = own->api;
    onnx_tensor t[INPUTS] = {0};
    size_t inputs = 0;
    void *status = ((void *(*)(void *, size_t *))api[COUNT_INPUTS])(context, &inputs);
    for (size_t i = 0; !status && i < inputs && i < INPUTS; i++) status = read_tensor(api, context, i, t + i);
    if (status) return status;
    const char *wrong = wrong_shape(t);
    if (wrong) return refuse(api, INVALID_ARGUMENT, wrong);
    int64_t shape[2] = {t[X].dims[0], outputs_of(t)};
    void *value = NULL, *y = NULL;
    status = ((void *(*)(void *, size_t, const int64_t *, size_t, void **))api[OUTPUT])(context, 0, shape, 2, &value);
    if (!status) status = ((void *(*)(void *, void **))api[TENSOR_DATA])(value, &y);
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
    calling.api = api, calling.context = context;
    int found = sparsify_moe_ffn(a);
    if (found == BAD_EXPERT) return refuse(api, INVALID_ARGUMENT, "an expert id is not in [-1, E)");
    return found == FINE ? NULL : refuse(api, FAIL, "no memory for the hidden values");
}

static void *create(const ort_op *op, ort_api api, const void *info, void **kernel) {
    static const char *const names[] = {"relu", "squared_relu", "gelu", "gelu_tanh", "silu"}; /* as in activations.h */
    char name[32] = {0};
    size_t size = sizeof name;
    (void)op;
    void *status =
        ((void *(*)(const void *, const char *, char *, size_t *))api[STRING_ATTRIBUTE])(info, "activation", name, &size);
    if (status) return status;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(name, names[i])) continue;
        onnx_kernel *made = malloc(sizeof *made);
        if (!made) return refuse(api, FAIL, "no memory for a kernel");
        *made = (onnx_kernel){api, (int64_t)i};
        *kernel = made;
        return NULL;
    }
    return refuse(api, INVALID_ARGUMENT, "activation must be relu, squared_relu, gelu, gelu_tanh or silu");
}

static const char *op_name(const ort_op *op) {
    (void)op;
    return "MoE";
}

static const char *on_cpu(const ort_op *op) {
    (void)op;
    return NULL;
}

static int type_of_input(const ort_op *op, size_t index) {
    (void)op;
    return index == IDS ? INT64 : FLOAT;
}

static int type_of_output(const ort_op *op, size_t index) {
    (void)op, (void)index;
    return FLOAT;
}

static size_t count_inputs(const ort_op *op) {
    (void)op;
    return INPUTS;
}

static size_t count_outputs(const ort_op *op) {
    (void)op;
    return 1;
}

static int kind_of_input(const ort_op *op, size_t index) {
    (void)op;
    return index == X || index == IDS || index == UP || index == DOWN ? REQUIRED : OPTIONAL;
}

static int zero(const ort_op *op, size_t index) {
    (void)op, (void)index;
    return 0; /* required; default memory */
}

static int first(const ort_op *op) {
    (void)op;
    return 1;
}

static int last(const ort_op *op) {
    (void)op;
    return INT32_MAX;
}

/* What onnxruntime calls when the library is registered; a status, or NULL. */
void *RegisterCustomOps(void *options, const ort_base *base) {
    static const ort_op op = {
        .version = API_VERSION,
        .name = op_name,
        .provider = on_cpu,
        .input_type = type_of_input,
        .inputs = count_inputs,
        .output_type = type_of_output,
        .outputs = count_outputs,
        .destroy = free,
        .input_kind = kind_of_input,
        .output_kind = zero,
        .input_memory = zero,
        .create_v2 = create,
        .compute_v2 = compute,
        .first_version = first,
        .last_version = last,
    };
    ort_api api = base->api(API_VERSION);
    void *domain = NULL; /* kept: sessions refer to it */
    if (!api) return NULL;
    void *status = ((void *(*)(const char *, void **))api[CREATE_DOMAIN])("ai.sparsify", &domain);
    if (!status) status = ((void *(*)(void *, const ort_op *))api[DOMAIN_ADD])(domain, &op);
    if (!status) status = ((void *(*)(void *, void *))api[ADD_DOMAIN])(options, domain);
    return status;
}
