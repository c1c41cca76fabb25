/* Activations on vectors, within a few units in the last place of fp32.

   exp(x) = 2^n exp(r), |r| <= ln(2) / 2, exp(r) a polynomial of degree 6 (relative error 3e-9).
   gelu(z) = z Phi(z), Phi(-s) = exp(-P(s)) for s >= 0 with P of degree 9 fitted to -ln Phi(-s) on [0, 6] by least
   squares, weighted so that the error of s Phi(-s) is even: 2e-9. Beyond 6, Phi(-6) = 1e-9 stands for Phi(-s). */

enum { RELU, SQUARED_RELU, GELU, GELU_TANH, SILU };

INLINE vf at_least(vf v, float low) {
    vi below = v < splat(low); /* false for NaN, which stays */
    return (vf)(((vi)v & ~below) | ((vi)splat(low) & below));
}

INLINE vf at_most(vf v, float high) {
    vi above = v > splat(high);
    return (vf)(((vi)v & ~above) | ((vi)splat(high) & above));
}

INLINE vf exponential(vf x) {
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    x = at_most(at_least(x, -87.3f), 88.3f);
    vf shifted = x * splat(1.44269504f) + magic;
    vf n = shifted - magic;
    vf r = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
    vf p = splat(0.0013814644189511953f);
    p = p * r + splat(0.008368711918592453f);
    p = p * r + splat(0.04166838526725769f);
    p = p * r + splat(0.1666652113199234f);
    p = p * r + splat(0.4999999403953552f);
    p = p * r * r + r + splat(1.0f);
    vi power = ((vi)shifted - (vi)magic + 127) << 23;
    return p * (vf)power;
}

/* Phi(-|z|). */
INLINE vf normal_tail(vf z) {
    static const float c[] = {-2.8092347294271e-07f,  5.546718512050575e-06f,   -4.557756983558647e-05f,
                              0.00017709140956867486f, 2.543506161600817e-05f,   -0.004841332323849201f,
                              0.036366190761327744f,   0.31830206513404846f,     0.7978852987289429f,
                              0.6931471824645996f};
    vf s = at_most((vf)((vi)z & 0x7fffffff), 6.0f);
    vf p = splat(c[0]);
    UNROLL
    for (int i = 1; i < 10; i++) p = p * s + splat(c[i]);
    return exponential(-p);
}

INLINE vf where(vi condition, vf yes, vf no) {
    return (vf)(((vi)yes & condition) | ((vi)no & ~condition));
}

INLINE vf gelu(vf z) {
    vf tail = z * normal_tail(z);
    return where(z > splat(0.0f), z - tail, tail);
}

INLINE vf gelu_tanh(vf z) {
    vf u = z * (splat(1.5957691216057308f) + z * z * splat(0.07135481282f)); /* 2 sqrt(2 / pi) (z + 0.044715 z^3) */
    return z / (splat(1.0f) + exponential(-u));
}

INLINE vf silu(vf z) {
    return z / (splat(1.0f) + exponential(-z));
}

/* In place; n may be rounded up to whole vectors. */
static void activate(float *z, int64_t n, int activation) {
    for (int64_t i = 0; i < n; i += VL) {
        vf v = loadf(z + i);
        if (activation == GELU) v = gelu(v);
        else if (activation == SILU) v = silu(v);
        else if (activation == GELU_TANH) v = gelu_tanh(v);
        else v = at_least(v, 0.0f);
        if (activation == SQUARED_RELU) v *= v;
        storef(z + i, v);
    }
}

/* act(z), and act'(z) in `slope`. */
INLINE vf with_slope(vf z, int activation, vf *slope) {
    const vf one = splat(1.0f);
    if (activation == RELU || activation == SQUARED_RELU) {
        vf positive = at_least(z, 0.0f);
        *slope = activation == RELU ? where(z > splat(0.0f), one, splat(0.0f)) : splat(2.0f) * positive;
        return activation == RELU ? positive : positive * positive;
    }
    if (activation == GELU) {
        vf tail = normal_tail(z), density = splat(0.3989422804014327f) * exponential(z * z * splat(-0.5f));
        vi positive = z > splat(0.0f);
        *slope = where(positive, one - tail, tail) + z * density;
        return where(positive, z - z * tail, z * tail);
    }
    vf u = z, steepness = one;
    if (activation == GELU_TANH) {
        u = z * (splat(1.5957691216057308f) + z * z * splat(0.07135481282f));
        steepness = splat(1.5957691216057308f) + z * z * splat(0.21406443846f);
    }
    vf power = exponential(-u), sigmoid = one / (one + power); /* power * sigmoid: 1 - sigmoid, without cancellation */
    *slope = sigmoid + z * sigmoid * (power * sigmoid) * steepness;
    return z * sigmoid;
}

/* In place: `up` becomes the hidden values, `d` the gradient of what `up` was, and `gate`, if there is one, its gradient;
   d comes in as the gradient of the hidden values. n may be rounded up to whole vectors. */
static void activate_backward(float *up, float *gate, float *d, int64_t n, int activation) {
    for (int64_t i = 0; i < n; i += VL) {
        vf slope, acted = with_slope(loadf((gate ? gate : up) + i), activation, &slope), wanted = loadf(d + i);
        if (!gate) {
            storef(up + i, acted);
            storef(d + i, wanted * slope);
            continue;
        }
        vf linear = loadf(up + i);
        storef(up + i, acted * linear);
        storef(gate + i, wanted * linear * slope);
        storef(d + i, wanted * acted);
    }
}
