/* What numbers are held in and computed with, functions of one number, and threads that meet. */

#pragma once
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <omp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#error "a compiler with __builtin_shufflevector is needed: GCC 12 or newer, or Clang"
#endif

#ifdef DOUBLE
typedef double real;
#else
typedef float real;
#endif

#ifdef BFLOAT16
typedef uint16_t stored;
static inline real wide(stored value) {
    uint32_t bits = (uint32_t)value << 16;
    real result;
    memcpy(&result, &bits, sizeof result);
    return result;
}
static inline stored narrow(real value) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (stored)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#else
typedef real stored;
static inline real wide(stored value) { return value; }
static inline stored narrow(real value) { return value; }
#endif

#ifdef DOUBLE
static inline real exponential(real x) { return exp(x); }
static inline real error_function(real x) { return erf(x); }
#else
static inline real exponential(real x) { /* 2^n e^r with |r| <= ln 2 / 2, and e^r as a polynomial (Cephes, expf); 1e-7 of the result */
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    real n = rintf(x * 1.44269504f);
    real r = x - n * 0.693359375f + n * 2.12194440e-4f;
    real p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    real power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}
static inline real error_function(real x) { /* Abramowitz and Stegun, 7.1.26; 1.5e-7 */
    real a = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * a);
    real p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    return copysignf(1.0f - p * exponential(-a * a), x);
}
#endif

enum { IDENTITY, SILU, GELU, GELU_TANH, RELU };

static inline real activate(real x, int64_t kind) {
    switch (kind) {
    case SILU: return x / (1 + exponential(-x));
    case GELU: return (real)0.5 * x * (1 + error_function(x * (real)0.70710678118654752440));
    case GELU_TANH: { /* x / 2 (1 + tanh u) = x / (1 + e^(-2u)) */
        real u = (real)0.79788456080286535588 * (x + (real)0.044715 * x * x * x);
        return x / (1 + exponential(-2 * u));
    }
    case RELU: return x > 0 ? x : (x != x ? x : 0);
    default: return x;
    }
}

enum { SPINS = 2000 };

typedef struct { /* where threads meet: arrivals so far, and threads that sleep until the next meeting is complete */
    atomic_int arrived, sleeping;
} Meeting;

typedef struct {
    Meeting *meeting;
    int index, count, expected;
} Thread;

/* Wait for all threads: awake for some ten microseconds, which is how far they are apart, then asleep, for the processors may be busy with
   something else. OpenMP's own barrier either spins for long or never, as the environment says. */
static void meet(Thread *thread) {
    Meeting *meeting = thread->meeting;
    thread->expected += thread->count;
    if (atomic_fetch_add(&meeting->arrived, 1) + 1 == thread->expected) {
        if (atomic_load(&meeting->sleeping)) syscall(SYS_futex, &meeting->arrived, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&meeting->arrived, memory_order_acquire) >= thread->expected) return;
        PAUSE();
    }
    atomic_fetch_add(&meeting->sleeping, 1);
    for (int seen; (seen = atomic_load(&meeting->arrived)) < thread->expected;)
        syscall(SYS_futex, &meeting->arrived, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&meeting->sleeping, 1);
}

/* A thread's range of outputs; in fours, as they are computed, so that a sum is taken in the same order whatever the number of threads. */
static inline int64_t from(int64_t length, const Thread *thread) { return length / 4 * thread->index / thread->count * 4; }
static inline int64_t to(int64_t length, const Thread *thread) {
    return thread->index + 1 == thread->count ? length : length / 4 * (thread->index + 1) / thread->count * 4;
}
