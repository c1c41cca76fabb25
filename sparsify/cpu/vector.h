/* Vectors of VL 32-bit lanes: AVX-512, AVX2 and what is left, by the vector extensions of GCC and Clang.

   A lane holds one fp32 or two neighbouring bf16. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VL 16
#define TILE_ROWS 6     /* rows of the dot product tile, by 4 columns: 24 accumulators of 32 registers */
#define TILE_COLUMNS 12 /* columns of the lane tile, by TILE_PANELS vectors */
#define TILE_PANELS 2
#define WIDE 4 /* vectors of a tile of weights in blocks, by TALL rows */
#define OUTER_ROWS 8 /* of a sum of outer products, by OUTER_VECTORS vectors */
#define OUTER_VECTORS 3
#define FEW_VECTORS 2 /* of outputs, whose weights of FEW_INPUTS inputs stay in registers */
#elif defined(__AVX2__)
#define VL 8
#define TILE_ROWS 3
#define TILE_COLUMNS 4
#define TILE_PANELS 3
#define WIDE 2
#define OUTER_ROWS 4
#define OUTER_VECTORS 2
#define FEW_VECTORS 1
#else
#define VL 4
#define TILE_ROWS 3
#define TILE_COLUMNS 4
#define TILE_PANELS 3
#define WIDE 2
#define OUTER_ROWS 4
#define OUTER_VECTORS 2
#define FEW_VECTORS 1
#endif
#define TALL 6
#define FEW_INPUTS 8
#define HALF (VL / 2)

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_4 _Pragma("clang loop unroll_count(4)")
#define SHUFFLE(a, b, ...) ((vf)__builtin_shufflevector(a, b, __VA_ARGS__))
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_4 _Pragma("GCC unroll 4")
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* A product as it is: what is added to it later does not make one operation with it. */
#if defined(__x86_64__)
#define ROUNDED(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define ROUNDED(v) __asm__("" : "+w"(v))
#else
#define ROUNDED(v) (void)(v)
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint64_t vd __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

/* Indices of shuffles. Of two vectors: LOW and HIGH interleave halves, PAIR_* interleave within groups of four lanes. Of
   one: MIX interleaves its halves, SWAP exchanges neighbours, EVEN takes every second lane. */
#if VL == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define PAIR_LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define PAIR_HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define MIX 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15
#define SWAP 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14
#define TURN_8 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7
#define TURN_4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#elif VL == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define PAIR_LOW 0, 8, 1, 9, 4, 12, 5, 13
#define PAIR_HIGH 2, 10, 3, 11, 6, 14, 7, 15
#define MIX 0, 4, 1, 5, 2, 6, 3, 7
#define SWAP 1, 0, 3, 2, 5, 4, 7, 6
#define EVEN 0, 2, 4, 6, 0, 2, 4, 6
#define TURN_4 4, 5, 6, 7, 0, 1, 2, 3
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#define PAIR_LOW LOW
#define PAIR_HIGH HIGH
#define MIX 0, 2, 1, 3
#define SWAP 1, 0, 3, 2
#define EVEN 0, 2, 0, 2
#endif

/* As an integer: to 0 + value the compiler adds. */
INLINE vf splat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (vf)((vu){0} + bits);
}

/* Two values, again and again. */
INLINE vf splat_two(const float *values) {
    uint64_t bits;
    memcpy(&bits, values, 8);
    return (vf)((vd){0} + bits);
}

INLINE vu load(const void *from) {
    vu v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* The first words of a vector, the rest 0. A copy of so many would be a call. */
INLINE vu load_words(const void *from, int64_t words) {
#if VL == 16
    return (vu)_mm512_maskz_loadu_epi32((__mmask16)((1u << words) - 1), from);
#elif VL == 8
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    return (vu)_mm256_maskload_epi32(from, (__m256i)(lanes < (int32_t)words));
#else
    if (words == VL) return load(from);
    vu v = {0};
    memcpy(&v, from, (size_t)words * 4);
    return v;
#endif
}

/* The first bytes, an even number, the rest 0. Naming a lane by a variable puts the vector into memory. */
INLINE vu load_part(const void *from, int64_t bytes) {
    vu v = load_words(from, bytes / 4);
    if (bytes % 4) v[bytes / 4] = *((const uint16_t *)from + bytes / 2 - 1);
    return v;
}

/* Its first bytes, a multiple of 4. */
INLINE void store_part(void *to, vf v, int64_t bytes) {
#if VL == 16
    _mm512_mask_storeu_epi32(to, (__mmask16)((1u << bytes / 4) - 1), (__m512i)v);
#elif VL == 8
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    _mm256_maskstore_epi32(to, (__m256i)(lanes < (int32_t)(bytes / 4)), (__m256i)v);
#else
    memcpy(to, &v, (size_t)bytes);
#endif
}

INLINE vf loadf(const float *from) {
    return (vf)load(from);
}

INLINE void storef(float *to, vf v) {
    memcpy(to, &v, sizeof v);
}

INLINE float bf16_value(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* To the nearest bf16, ties to even, NaN stays NaN; in the low half of each lane. */
INLINE vu bf16_bits(vf v) {
    vu u = (vu)v;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu nan = (vu)(v != v);
    return (rounded & ~nan) | (nan & 0x7fc0u);
}

/* acc + a * b per lane: one product of fp32, or two of bf16. */
INLINE vf multiply_add(vf acc, vu a, vu b, int bf16) {
    if (!bf16) return acc + (vf)a * (vf)b;
#if defined(__AVX512BF16__) && VL == 16
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc += (vf)(a << 16) * (vf)(b << 16);
    return acc + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
}

/* Sums of the lanes of four vectors, in the first four lanes. */
INLINE vf sum_lanes(vf a, vf b, vf c, vf d) {
    vf p = SHUFFLE(a, c, PAIR_LOW) + SHUFFLE(a, c, PAIR_HIGH);
    vf q = SHUFFLE(b, d, PAIR_LOW) + SHUFFLE(b, d, PAIR_HIGH);
    vf r = SHUFFLE(p, q, PAIR_LOW) + SHUFFLE(p, q, PAIR_HIGH);
#if VL == 16
    r += SHUFFLE(r, r, TURN_8);
#endif
#if VL >= 8
    r += SHUFFLE(r, r, TURN_4);
#endif
    return r;
}

/* VL vectors of VL lanes, rows become columns: log2(VL) perfect shuffles. */
INLINE void transpose(vf *v) {
    vf w[VL];
    UNROLL
    for (int step = 1; step < VL; step *= 2) {
        UNROLL
        for (int i = 0; i < VL / 2; i++) {
            w[2 * i] = SHUFFLE(v[i], v[i + VL / 2], LOW);
            w[2 * i + 1] = SHUFFLE(v[i], v[i + VL / 2], HIGH);
        }
        UNROLL
        for (int i = 0; i < VL; i++) v[i] = w[i];
    }
}
