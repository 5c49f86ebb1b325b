/* Vectors of eight floats: GCC's and Clang's vector types, or plain C11 that a compiler vectorises as well as it can
 * (MSVC, or SE_PORTABLE). Both take the same steps; they may differ in the last bit where a compiler joins a product
 * and a sum. */
#ifndef SE_SIMD_H
#define SE_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(SE_PORTABLE) /* Clang says so too, clang-cl included */
#define SE_VECTOR_TYPES
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(SE_PORTABLE) && !defined(__SANITIZE_THREAD__)
/* The package is built once and may be moved: pick the instruction set when it is loaded (an ifunc, which musl
 * lacks). */
#if __GNUC__ >= 12
#define SE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SE_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#endif
#else
#define SE_CLONES
#endif

#if defined(SE_VECTOR_TYPES)
#define SE_INLINE static inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define SE_INLINE static __forceinline
#else
#define SE_INLINE static inline
#endif

enum { LANES = 8 };

#ifdef SE_VECTOR_TYPES

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(32)));

SE_INLINE vec vec_splat(float x) { return (vec) { x, x, x, x, x, x, x, x }; }
SE_INLINE vec vec_add(vec a, vec b) { return a + b; }
SE_INLINE vec vec_sub(vec a, vec b) { return a - b; }
SE_INLINE vec vec_mul(vec a, vec b) { return a * b; }
SE_INLINE vec vec_mul_add(vec a, vec b, vec c) { return a * b + c; }
/* x * b + c. In loops, in place of a vec_splat: inlined into a clone for a larger instruction set, GCC 12 makes that of eight insertions. */
SE_INLINE vec vec_scale_add(float x, vec b, vec c) { return x * b + c; }
SE_INLINE float vec_lane(vec a, int i) { return a[i]; }

/* e^x for x <= 0 to within 2 ulp: x = n ln2 + r with |r| <= ln2 / 2, then a polynomial in r (Cephes expf). Below -87
 * the result is 0, which covers -inf. */
SE_INLINE vec vec_exp_negative(vec x) {
    const ivec tiny = x < vec_splat(-87.0f);
    const vec magic = vec_splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const vec clamped = (vec) (((ivec) x & ~tiny) | ((ivec) vec_splat(-87.0f) & tiny));
    const vec shifted = clamped * vec_splat(1.44269504088896341f) + magic;
    const vec n = shifted - magic;
    const vec r = (clamped - n * vec_splat(0.693359375f)) - n * vec_splat(-2.12194440e-4f);
    vec p = vec_splat(1.9875691500e-4f);
    p = p * r + vec_splat(1.3981999507e-3f);
    p = p * r + vec_splat(8.3334519073e-3f);
    p = p * r + vec_splat(4.1665795894e-2f);
    p = p * r + vec_splat(1.6666665459e-1f);
    p = p * r + vec_splat(5.0000001201e-1f);
    p = p * r * r + r + vec_splat(1.0f);
    const ivec exponent = (((ivec) shifted - (ivec) magic) + 127) << 23;
    const vec y = p * (vec) exponent;
    return (vec) ((ivec) y & ~tiny);
}

#else

typedef struct {
    float lane[LANES];
} vec;

SE_INLINE vec vec_splat(float x) {
    vec v;
    for (int i = 0; i < LANES; i++) v.lane[i] = x;
    return v;
}

SE_INLINE vec vec_add(vec a, vec b) {
    for (int i = 0; i < LANES; i++) a.lane[i] += b.lane[i];
    return a;
}

SE_INLINE vec vec_sub(vec a, vec b) {
    for (int i = 0; i < LANES; i++) a.lane[i] -= b.lane[i];
    return a;
}

SE_INLINE vec vec_mul(vec a, vec b) {
    for (int i = 0; i < LANES; i++) a.lane[i] *= b.lane[i];
    return a;
}

SE_INLINE vec vec_mul_add(vec a, vec b, vec c) {
    for (int i = 0; i < LANES; i++) c.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return c;
}

SE_INLINE vec vec_scale_add(float x, vec b, vec c) {
    for (int i = 0; i < LANES; i++) c.lane[i] = x * b.lane[i] + c.lane[i];
    return c;
}

SE_INLINE float vec_lane(vec a, int i) { return a.lane[i]; }

/* As above, lane by lane. n is rounded by the conversion to an integer instead of by an addition, which options such
 * as MSVC's /fp:fast would cancel. */
SE_INLINE float exp_negative(float x) {
    const float clamped = x >= -87.0f ? x : -87.0f; /* a NaN too: it has no integer */
    const int32_t whole = (int32_t) (clamped * 1.44269504088896341f - 0.5f);
    const float n = (float) whole;
    const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x >= -87.0f ? p * power : x < -87.0f ? 0.0f : x;
}

SE_INLINE vec vec_exp_negative(vec x) {
    for (int i = 0; i < LANES; i++) x.lane[i] = exp_negative(x.lane[i]);
    return x;
}

#endif

SE_INLINE vec vec_load(const float * p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

SE_INLINE void vec_store(float * p, vec v) { memcpy(p, &v, sizeof v); }

#endif
