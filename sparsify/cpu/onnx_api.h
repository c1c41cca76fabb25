/* Ops for onnxruntime on the CPU, registered by SessionOptions.register_custom_ops_library(this): what all of them need.

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
    INT_ATTRIBUTE = 86,
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

/* All inputs of a call; those that are left out have rank 0. A status, or NULL. */
static void *read_tensors(ort_api api, void *context, onnx_tensor *to, size_t most) {
    size_t inputs = 0;
    void *status = ((void *(*)(void *, size_t *))api[COUNT_INPUTS])(context, &inputs);
    for (size_t i = 0; !status && i < inputs && i < most; i++) status = read_tensor(api, context, i, to + i);
    return status;
}

/* The one output, a matrix. A status, or NULL. */
static void *make_output(ort_api api, void *context, const int64_t shape[2], void **data) {
    void *value = NULL, *status;
    status = ((void *(*)(void *, size_t, const int64_t *, size_t, void **))api[OUTPUT])(context, 0, shape, 2, &value);
    return status ? status : ((void *(*)(void *, void **))api[TENSOR_DATA])(value, data);
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

static int64_t address(const void *pointer) {
    return (int64_t)(intptr_t)pointer;
}

/* Few rows of inputs for all experts, as they are. */
static int has_rows(const onnx_tensor *t, int64_t experts, int64_t inputs, int64_t outputs) {
    if (t->rank != 3 || outputs > MOST_IN_ROWS) return 0;
    return t->dims[0] == experts && t->dims[1] == outputs && t->dims[2] == inputs;
}

/* In blocks [E, B, inputs, b], in rows [E, outputs, inputs], or left out. */
static void put_matrix(int64_t *a, const onnx_tensor *weight, const onnx_tensor *bias) {
    int64_t in_blocks = weight->rank == 4, row = weight->dims[in_blocks ? 3 : 2] * 4;
    int64_t rows = weight->dims[1] * (in_blocks ? weight->dims[2] : 1);
    a[0] = address(weight->data), a[1] = rows * row, a[2] = row;
    a[3] = address(bias->data), a[4] = bias->dims[1] * 4;
}

/* How many threads a session has is not told: workers that are too many find no task left. */
static int64_t workers_for(int64_t operations) {
    static int64_t processors; /* asking takes as long as a small layer, as a file is read */
    int64_t known = __atomic_load_n(&processors, __ATOMIC_RELAXED);
    if (operations < SMALL) return 1;
    if (!known) {
        known = sysconf(_SC_NPROCESSORS_ONLN);
        known = known < 1 ? 1 : least(known, MAX_WORKERS);
        __atomic_store_n(&processors, known, __ATOMIC_RELAXED);
    }
    return known;
}

static const char *on_cpu(const ort_op *op) {
    (void)op;
    return NULL;
}

static size_t one_output(const ort_op *op) {
    (void)op;
    return 1;
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

/* Of the functions that begin with its name. */
#define CPU_OP(op)                         \
    {                                      \
        .version = API_VERSION,            \
        .name = op##_name,                 \
        .provider = on_cpu,                \
        .input_type = op##_input_type,     \
        .inputs = op##_inputs,             \
        .output_type = op##_output_type,   \
        .outputs = one_output,             \
        .destroy = free,                   \
        .input_kind = op##_input_kind,     \
        .output_kind = zero,               \
        .input_memory = zero,              \
        .create_v2 = op##_create,          \
        .compute_v2 = op##_compute,        \
        .first_version = first,            \
        .last_version = last,              \
    }
