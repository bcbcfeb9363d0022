// Numbers as vectors of float32, whatever their type, and matrices of them turned over. Included by native.cpp.

#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#ifdef __AVX512F__
enum { V = 16, ROWS = 12 };  // with one panel of two vectors, 24 sums of the 32 registers
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
enum { V = 8, ROWS = 6 };
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#endif
enum { PANEL = 2 * V, FEW = 6 };
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * V)));
typedef uint16_t halves __attribute__((vector_size(2 * V), aligned(2), may_alias));
typedef _Float16 floats16 __attribute__((vector_size(2 * V), aligned(2), may_alias));
struct bfloat16 { uint16_t bits; };

// Numbers of each type as float32, and back, rounded to nearest even.

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE vec load(const bfloat16 *p) { return (vec)(__builtin_convertvector(*(const halves *)p, words) << 16); }
INLINE vec load(const _Float16 *p) { return __builtin_convertvector(*(const floats16 *)p, vec); }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE void store(_Float16 *p, vec v) { *(floats16 *)p = __builtin_convertvector(v, floats16); }
INLINE void store(bfloat16 *p, vec v) {
  words bits = (words)v, nan = (words)(v != v), rounded = bits + 0x7fff + ((bits >> 16) & 1);
  *(halves *)p = __builtin_convertvector(((nan & (bits | 1 << 22)) | (~nan & rounded)) >> 16, halves);
}
INLINE float widened(float v) { return v; }
INLINE float widened(_Float16 v) { return v; }
INLINE float widened(bfloat16 v) {
  uint32_t bits = (uint32_t)v.bits << 16;
  float found;
  memcpy(&found, &bits, 4);
  return found;
}
INLINE void narrowed(float v, float *p) { *p = v; }
INLINE void narrowed(float v, _Float16 *p) { *p = (_Float16)v; }
INLINE void narrowed(float v, bfloat16 *p) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  uint32_t nan = (bits & 0x7fffffff) > 0x7f800000;
  p->bits = nan ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
template <class T> static void widen(const T *from, float *to, int64_t count) {
  int64_t i = 0;
  for (; i + V <= count; i += V) store(to + i, load(from + i));
  for (; i < count; i++) to[i] = widened(from[i]);
}
template <class T> static void narrow(const float *from, T *to, int64_t count) {
  int64_t i = 0;
  for (; i + V <= count; i += V) store(to + i, load(from + i));
  for (; i < count; i++) narrowed(from[i], to + i);
}

// Transpositions.

INLINE void turn(vec *r) {
  UNROLL for (int step = 1; step < V; step *= 2) {
    vec next[V];
    UNROLL for (int i = 0; i < V / 2; i++) {
      next[2 * i] = __builtin_shufflevector(r[i], r[i + V / 2], LOW);
      next[2 * i + 1] = __builtin_shufflevector(r[i], r[i + V / 2], HIGH);
    }
    UNROLL for (int i = 0; i < V; i++) r[i] = next[i];
  }
}

// to[k * ldt + n] = from[n * ldf + k]
template <class T>
static void transpose(const T *from, int64_t ldf, int64_t rows, int64_t columns, float *to, int64_t ldt) {
  int64_t whole_rows = rows / V * V, whole_columns = columns / V * V;
  for (int64_t n = 0; n < whole_rows; n += V)
    for (int64_t k = 0; k < whole_columns; k += V) {
      vec r[V];
      UNROLL for (int i = 0; i < V; i++) r[i] = load(from + (n + i) * ldf + k);
      turn(r);
      UNROLL for (int i = 0; i < V; i++) store(to + (k + i) * ldt + n, r[i]);
    }
  for (int64_t n = 0; n < rows; n++)
    for (int64_t k = n < whole_rows ? whole_columns : 0; k < columns; k++) to[k * ldt + n] = widened(from[n * ldf + k]);
}

// Memory of a call, cut into pieces.

struct Memory {
  float *next;
  float *take(int64_t count) {
    float *found = next;
    next += (count + V - 1) / V * V;
    return found;
  }
};
