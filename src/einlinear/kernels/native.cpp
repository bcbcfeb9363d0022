// A chain of block-diagonal maps and its derivative, a few tokens at a time. Compiled where it runs (toolchain.py).
//
// Tokens are rows. Of each map, out[b * made + n] is the sum over k of W[b][n][k] * in[turned ? k * slices + b : b *
// summed + k]; where parts of the input share one W, out[(b * made + n) * inner + q] that of W[n][k] * in[(b * summed + k)
// * inner + q]. What lies between two maps is float32 and does not leave the cache. One small product of a few rows and a
// panel of columns, held in registers, does all the work: forward, for the gradient of the input and for those of weights.

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

// The product.

// c[i][j] (+)= sum over p of a[i * row + p * step] * panel[p * ldb + j], for M rows and W vectors of columns, of which
// `valid` are kept.
template <int M, int W>
INLINE void tile(const float *a, int64_t row, int64_t step, int64_t count, const float *panel, int64_t ldb, float *c,
                 int64_t ldc, int64_t valid, bool add) {
  vec sum[M][W] = {};
  for (int64_t p = 0; p < count; p++) {
    vec b[W];
    UNROLL for (int j = 0; j < W; j++) b[j] = load(panel + p * ldb + j * V);
    UNROLL for (int i = 0; i < M; i++) {
      vec each = a[i * row + p * step] - (vec){};
      UNROLL for (int j = 0; j < W; j++) sum[i][j] += each * b[j];
    }
  }
  if (valid == W * V) {
    UNROLL for (int i = 0; i < M; i++)
      UNROLL for (int j = 0; j < W; j++) {
        float *place = c + i * ldc + j * V;
        store(place, add ? load(place) + sum[i][j] : sum[i][j]);
      }
    return;
  }
  float rest[W * V];
  for (int i = 0; i < M; i++) {
    UNROLL for (int j = 0; j < W; j++) store(rest + j * V, sum[i][j]);
    for (int64_t j = 0; j < valid; j++) c[i * ldc + j] = rest[j] + (add ? c[i * ldc + j] : 0);
  }
}

template <int M>
static void rows_by(const float *a, int64_t row, int64_t step, int64_t count, const float *panel, int64_t ldb, float *c,
                    int64_t ldc, int64_t valid, bool add) {
  if (valid > V) tile<M, 2>(a, row, step, count, panel, ldb, c, ldc, valid, add);
  else tile<M, 1>(a, row, step, count, panel, ldb, c, ldc, valid, add);
}

// For any number of rows.
static void product(const float *a, int64_t row, int64_t step, int64_t rows, int64_t count, const float *panel,
                    int64_t ldb, float *c, int64_t ldc, int64_t valid, bool add) {
  int64_t i = 0;
  for (; rows - i >= ROWS; i += ROWS) rows_by<ROWS>(a + i * row, row, step, count, panel, ldb, c + i * ldc, ldc, valid, add);
  for (; rows - i >= 4; i += 4) rows_by<4>(a + i * row, row, step, count, panel, ldb, c + i * ldc, ldc, valid, add);
  for (; rows - i >= 2; i += 2) rows_by<2>(a + i * row, row, step, count, panel, ldb, c + i * ldc, ldc, valid, add);
  for (; rows - i >= 1; i += 1) rows_by<1>(a + i * row, row, step, count, panel, ldb, c + i * ldc, ldc, valid, add);
}

// Maps.

struct Map { int64_t slices, made, summed, turned, shared, inner; };

static int64_t inputs(const Map &m) { return m.slices * m.summed * m.inner; }
static int64_t outputs(const Map &m) { return m.slices * m.made * m.inner; }
static int64_t matrices(const Map &m) { return m.shared ? 1 : m.slices; }
static int64_t numbers(const Map &m) { return matrices(m) * m.made * m.summed; }
static bool shares(const Map *maps, int64_t count) {
  for (int64_t k = 0; k < count; k++)
    if (maps[k].shared) return true;
  return false;
}
static int64_t panels(int64_t width) { return (width + PANEL - 1) / PANEL; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t padded(int64_t width) { return ((width + V - 1) / V | 1) * V; }  // in lines odd, or rows would share a cache's sets

// Where the panels lie that a map is multiplied by: one of each slice and PANEL columns.
struct Panels { const float *start; int64_t slice, panel, row; };

// Of W's transpose, [slice][panel][summed][PANEL], of which this is one slice.
template <class T> static void pack_forward(const Map &m, const T *weight, int64_t b, float *packed) {
  if (m.inner > 1) return widen(weight, packed, numbers(m));
  const T *w = weight + b * m.made * m.summed;
  packed += b * panels(m.made) * m.summed * PANEL;
  for (int64_t q = 0; q < panels(m.made); q++, packed += m.summed * PANEL) {
    int64_t valid = least(m.made - q * PANEL, PANEL);
    if (valid < PANEL) memset(packed, 0, sizeof(float) * m.summed * PANEL);
    transpose(w + q * PANEL * m.summed, m.summed, valid, m.summed, packed, PANEL);
  }
}
static Panels forward_panels(const Map &m, const float *packed) {
  return {packed, m.shared ? 0 : panels(m.made) * m.summed * PANEL, m.summed * PANEL, PANEL};
}

// Of W, [slice][panel][made][PANEL], of which this is one slice.
template <class T> static void pack_backward(const Map &m, const T *weight, int64_t b, float *packed) {
  if (m.inner > 1) return widen(weight, packed, numbers(m));
  const T *w = weight + b * m.made * m.summed;
  packed += b * panels(m.summed) * m.made * PANEL;
  for (int64_t q = 0; q < panels(m.summed); q++)
    for (int64_t n = 0; n < m.made; n++, packed += PANEL) {
      int64_t valid = least(m.summed - q * PANEL, PANEL);
      if (valid < PANEL) memset(packed, 0, sizeof(float) * PANEL);
      widen(w + n * m.summed + q * PANEL, packed, valid);
    }
}
static Panels backward_panels(const Map &m, const float *packed) {
  return {packed, m.shared ? 0 : panels(m.summed) * m.made * PANEL, m.made * PANEL, PANEL};
}

// out = in by a map; `slice` and `step` say how far apart the inputs of two slices lie, and those of one sum.
static void multiply(int64_t slices, int64_t made, int64_t summed, Panels from, int64_t rows, const float *in, int64_t ldi,
                     int64_t slice, int64_t step, float *out, int64_t ldo) {
  for (int64_t i = 0; i < rows; i += ROWS)  // few rows pass all slices: they then stay in the first-level cache
    for (int64_t b = 0; b < slices; b++)
      for (int64_t q = 0; q * PANEL < made; q++)
        product(in + i * ldi + b * slice, ldi, step, least(rows - i, ROWS), summed,
                from.start + b * from.slice + q * from.panel, from.row, out + i * ldo + b * made + q * PANEL, ldo,
                least(made - q * PANEL, PANEL), false);
}

// out = in by a map of `inner` parts, which are the columns of a product by W, [made][summed], or by its transpose.
static void multiply_inner(const Map &m, const float *w, bool back, int64_t rows, const float *in, int64_t ldi, float *out,
                           int64_t ldo) {
  int64_t made = back ? m.summed : m.made, summed = back ? m.made : m.summed;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t b = 0; b < m.slices; b++)
      for (int64_t q = 0; q < m.inner; q += PANEL)
        product(w, back ? 1 : m.summed, back ? m.summed : 1, made, summed, in + i * ldi + b * summed * m.inner + q, m.inner,
                out + i * ldo + b * made * m.inner + q, m.inner, least(m.inner - q, PANEL), false);
}

static void forth_by(const Map &m, const float *packed, int64_t rows, const float *in, int64_t ldi, float *out, int64_t ldo) {
  if (m.inner > 1) return multiply_inner(m, packed, false, rows, in, ldi, out, ldo);
  multiply(m.slices, m.made, m.summed, forward_panels(m, packed), rows, in, ldi, m.turned ? 1 : m.summed,
           m.turned ? m.slices : 1, out, ldo);
}

// The gradient of the input from that of the output; of what is turned, slice after slice.
static void back_by(const Map &m, const float *packed, int64_t rows, const float *dout, int64_t ldo, float *din, int64_t ldi) {
  if (m.inner > 1) return multiply_inner(m, packed, true, rows, dout, ldo, din, ldi);
  multiply(m.slices, m.summed, m.made, backward_panels(m, packed), rows, dout, ldo, m.made, 1, din, ldi);
}

// The gradient of W, added to what is there or not; `free_` is memory of `summed + 2 * V` numbers for each of `inner`.
static void weights_by(const Map &m, int64_t rows, const float *dout, int64_t ldo, const float *in, int64_t ldi, float *dw,
                       bool add, float *free_) {
  if (m.inner > 1) {
    int64_t wide = padded(m.summed);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t b = 0; b < m.slices; b++, add = true) {
        transpose(in + i * ldi + b * m.summed * m.inner, m.inner, m.summed, m.inner, free_, wide);
        for (int64_t q = 0; q < m.summed; q += PANEL)
          product(dout + i * ldo + b * m.made * m.inner, m.inner, 1, m.made, m.inner, free_ + q, wide, dw + q, m.summed,
                  least(m.summed - q, PANEL), add);
      }
    return;
  }
  for (int64_t b = 0; b < m.slices; b++, dw += m.shared ? 0 : m.made * m.summed)
    for (int64_t q = 0; q < m.summed; q += PANEL)
      product(dout + b * m.made, 1, ldo, m.made, rows, in + b * m.summed + q, ldi, dw + q, m.summed,
              least(m.summed - q, PANEL), add || (m.shared && b));
}

// Of few tokens: rows of W as they lie, each read once. `in` has slices one after the other.

// The sum of each of V vectors, in one.
INLINE vec totals(vec *r) {
  UNROLL for (int left = V / 2; left; left /= 2)
    UNROLL for (int i = 0; i < left; i++)
      r[i] = __builtin_shufflevector(r[i], r[i + left], LOW) + __builtin_shufflevector(r[i], r[i + left], HIGH);
  return r[0];
}

// M tokens by V / M rows of W, of which `valid` are there.
template <int M, class T>
INLINE void dots(const T *w, int64_t valid, int64_t summed, const float *in, int64_t ldi, float *out, int64_t ldo) {
  enum { N = V / M };
  const T *row[N];
  UNROLL for (int n = 0; n < N; n++) row[n] = w + least(n, valid - 1) * summed;
  vec sum[V] = {};
  int64_t k = 0;
  for (; k + V <= summed; k += V) {
    vec x[M];
    UNROLL for (int i = 0; i < M; i++) x[i] = load(in + i * ldi + k);
    UNROLL for (int n = 0; n < N; n++) {
      vec each = load(row[n] + k);
      UNROLL for (int i = 0; i < M; i++) sum[i * N + n] += x[i] * each;
    }
  }
  float found[V];
  store(found, totals(sum));
  for (; k < summed; k++)
    for (int n = 0; n < N; n++)
      for (int i = 0; i < M; i++) found[i * N + n] += in[i * ldi + k] * widened(row[n][k]);
  for (int i = 0; i < M; i++) {
    if (valid >= N) memcpy(out + i * ldo, found + i * N, N * sizeof(float));
    else for (int64_t n = 0; n < valid; n++) out[i * ldo + n] = found[i * N + n];
  }
}

template <int M, class T>
static void slice_of_few(const Map &m, const T *w, const float *in, int64_t ldi, float *out, int64_t ldo) {
  for (int64_t n = 0; n < m.made; n += V / M) dots<M>(w + n * m.summed, m.made - n, m.summed, in, ldi, out + n, ldo);
}

template <class T>
static void apply_few(const Map &m, const T *w, int64_t b, int64_t rows, const float *in, int64_t ldi, float *out, int64_t ldo) {
  const T *slice = w + b * m.made * m.summed;
  const float *from = in + b * m.summed;
  float *to = out + b * m.made;
  int64_t i = 0;
  for (; rows - i >= 4; i += 4) slice_of_few<4>(m, slice, from + i * ldi, ldi, to + i * ldo, ldo);
  for (; rows - i >= 2; i += 2) slice_of_few<2>(m, slice, from + i * ldi, ldi, to + i * ldo, ldo);
  for (; rows - i >= 1; i += 1) slice_of_few<1>(m, slice, from + i * ldi, ldi, to + i * ldo, ldo);
}

// The gradient of what few tokens gave: din = dout by W, whose rows are read in their order, four at a time.
template <int M, int N, class T>
INLINE void add_rows(const T *w, int64_t summed, const float *dout, int64_t ldo, float *din, int64_t ldi, bool add) {
  int64_t k = 0;
  for (; k + V <= summed; k += V) {
    vec row[N];
    UNROLL for (int n = 0; n < N; n++) row[n] = load(w + n * summed + k);
    UNROLL for (int i = 0; i < M; i++) {
      vec sum = add ? load(din + i * ldi + k) : (vec){};
      UNROLL for (int n = 0; n < N; n++) sum += dout[i * ldo + n] * row[n];
      store(din + i * ldi + k, sum);
    }
  }
  for (; k < summed; k++)
    for (int i = 0; i < M; i++) {
      float sum = add ? din[i * ldi + k] : 0;
      for (int n = 0; n < N; n++) sum += dout[i * ldo + n] * widened(w[n * summed + k]);
      din[i * ldi + k] = sum;
    }
}

template <class T>
static void back_few(const Map &m, const T *weight, int64_t rows, const float *dout, int64_t ldo, float *din, int64_t ldi) {
  for (int64_t b = 0; b < m.slices; b++) {
    const T *w = weight + b * m.made * m.summed;
    const float *from = dout + b * m.made;
    float *to = din + b * m.summed;
    int64_t n = 0;
    for (; n + 4 <= m.made; n += 4, w += 4 * m.summed) {
      int64_t i = 0;
      for (; rows - i >= 4; i += 4) add_rows<4, 4>(w, m.summed, from + i * ldo + n, ldo, to + i * ldi, ldi, n);
      for (; rows - i >= 1; i += 1) add_rows<1, 4>(w, m.summed, from + i * ldo + n, ldo, to + i * ldi, ldi, n);
    }
    for (; n < m.made; n++, w += m.summed)
      for (int64_t i = 0; i < rows; i++) add_rows<1, 1>(w, m.summed, from + i * ldo + n, ldo, to + i * ldi, ldi, n);
  }
}

// Their gradient of the weights, written in the order it lies in.
template <class T>
static void outer_few(const Map &m, int64_t rows, const float *dout, int64_t ldo, const float *in, int64_t ldi, T *dw) {
  for (int64_t b = 0; b < m.slices; b++)
    for (int64_t n = 0; n < m.made; n++, dw += m.summed) {
      const float *scale = dout + b * m.made + n, *from = in + b * m.summed;
      int64_t k = 0;
      for (; k + V <= m.summed; k += V) {
        vec sum = {};
        for (int64_t i = 0; i < rows; i++) sum += scale[i * ldo] * load(from + i * ldi + k);
        store(dw + k, sum);
      }
      for (; k < m.summed; k++) {
        float sum = 0;
        for (int64_t i = 0; i < rows; i++) sum += scale[i * ldo] * from[i * ldi + k];
        narrowed(sum, dw + k);
      }
    }
}

// What a map sums over, slice after slice; `free_` is memory for it.
static const float *gathered(const Map &m, int64_t rows, const float *in, int64_t ldi, float *free_, int64_t ld) {
  if (!m.turned) return in;
  for (int64_t i = 0; i < rows; i++) transpose(in + i * ldi, m.slices, m.summed, m.slices, free_ + i * ld, m.summed);
  return free_;
}

static Map slicewise(Map m) {  // for an input that was gathered
  m.turned = 0;
  return m;
}

static void scattered(const Map &m, int64_t rows, const float *in, int64_t ldi, float *out, int64_t ldo) {
  for (int64_t i = 0; i < rows; i++)
    if (m.turned) transpose(in + i * ldi, m.summed, m.slices, m.summed, out + i * ldo, m.slices);
    else memcpy(out + i * ldo, in + i * ldi, sizeof(float) * inputs(m));
}

// Both ways.

struct Memory {
  float *next;
  float *take(int64_t count) {
    float *found = next;
    next += (count + V - 1) / V * V;
    return found;
  }
};

static int64_t widest(const Map *maps, int64_t count) {
  int64_t found = 0;
  for (int64_t k = 0; k < count; k++) {
    if (padded(inputs(maps[k])) > found) found = padded(inputs(maps[k]));
    if (padded(outputs(maps[k])) > found) found = padded(outputs(maps[k]));
  }
  return found;
}

static int64_t group(const Map *maps, int64_t count) {  // tokens of which the backward keeps all states at a time
  return 4 * ROWS;
}

template <class T> struct Call {
  int64_t count, tokens, threads;
  const Map *maps;
  const T *const *weights;
  const T *x, *bias;
  int64_t ldx;
  float *memory;
  const int64_t *plan;  // of pairs, or null
};

// What there is for bfloat16 where the processor multiplies pairs.
#ifdef __AVX512BF16__
#include "native_pairs.h"
#else
static int64_t plans(int64_t, const Map *, int64_t *) { return 0; }
static int64_t pairs_memory(int64_t, const Map *, int64_t, const int64_t *) { return 0; }
static int64_t pairs_backward_memory(int64_t, const Map *, int64_t, const int64_t *) { return 0; }
static bool by_pairs(int64_t, const int64_t *) { return false; }
static void forward_pairs(const Call<bfloat16> &, bfloat16 *) {}
static void backward_pairs(const Call<bfloat16> &, const bfloat16 *, int64_t, bfloat16 *, bfloat16 *const *) {}
#endif
template <class T> static void forward_pairs(const Call<T> &, T *) {}
template <class T> static void backward_pairs(const Call<T> &, const T *, int64_t, T *, T *const *) {}

static float *direct(float *y) { return y; }
template <class T> static float *direct(T *) { return nullptr; }

template <class T> static void finish(const float *from, int64_t ldf, const T *bias, int64_t rows, int64_t width, T *to) {
  for (int64_t i = 0; i < rows; i++, from += ldf, to += width) {
    int64_t j = 0;
    if (bias) {
      for (; j + V <= width; j += V) store(to + j, load(from + j) + load(bias + j));
      for (; j < width; j++) narrowed(from[j] + widened(bias[j]), to + j);
    } else if ((const void *)from != (const void *)to) narrow(from, to, width);
  }
}

template <class T> static void forward_few(const Call<T> &call, T *y) {
  int64_t wide = widest(call.maps, call.count), rows = call.tokens, width = outputs(call.maps[call.count - 1]);
  Memory memory = {call.memory};
  float *state = memory.take(FEW * wide), *other = memory.take(FEW * wide), *sums = memory.take(FEW * wide);
  for (int64_t i = 0; i < rows; i++) widen(call.x + i * call.ldx, state + i * wide, inputs(call.maps[0]));
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  for (int64_t k = 0; k < call.count; k++) {
    const Map &m = call.maps[k];
    const float *in = k % 2 ? other : state;
    float *out = k % 2 ? state : other;
#pragma omp single
    gathered(m, rows, in, wide, sums, wide);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < m.slices; b++) apply_few(m, call.weights[k], b, rows, m.turned ? sums : in, wide, out, wide);
  }
  finish(call.count % 2 ? other : state, wide, call.bias, rows, width, y);
}

template <class T> static void forward_many(const Call<T> &call, T *y) {
  int64_t wide = widest(call.maps, call.count), last = call.count - 1, width = outputs(call.maps[last]);
  Memory memory = {call.memory};
  float *packed[call.count];
  for (int64_t k = 0; k <= last; k++)
    packed[k] = memory.take(matrices(call.maps[k]) * panels(call.maps[k].made) * call.maps[k].summed * PANEL);
  float *states = memory.take(call.threads * 2 * ROWS * wide);
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
    float *state = states + omp_get_thread_num() * 2 * ROWS * wide, *other = state + ROWS * wide;
    for (int64_t k = 0; k <= last; k++) {
#pragma omp for schedule(static) nowait
      for (int64_t b = 0; b < matrices(call.maps[k]); b++) pack_forward(call.maps[k], call.weights[k], b, packed[k]);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t start = 0; start < call.tokens; start += ROWS) {
      int64_t rows = least(call.tokens - start, ROWS);
      for (int64_t i = 0; i < rows; i++) widen(call.x + (start + i) * call.ldx, state + i * wide, inputs(call.maps[0]));
      for (int64_t k = 0; k <= last; k++) {
        const Map &m = call.maps[k];
        float *in = k % 2 ? other : state, *out = k % 2 ? state : other, *whole = direct(y);
        bool ends = k == last && whole;
        if (ends) out = whole + start * width;
        forth_by(m, packed[k], rows, in, wide, out, ends ? width : wide);
        if (k == last) finish(out, ends ? width : wide, call.bias, rows, width, y + start * width);
      }
    }
  }
}

template <class T> static void backward(const Call<T> &call, const T *grad, int64_t ldg, T *dx, T *const *dweights) {
  int64_t wide = widest(call.maps, call.count), last = call.count - 1, step = group(call.maps, call.count);
  bool few = call.tokens < FEW && !shares(call.maps, call.count);
  Memory memory = {call.memory};
  float *forth[call.count], *back[call.count], *sums[call.count];
  int64_t size[call.count];
  for (int64_t k = 0; k <= last; k++) {
    const Map &m = call.maps[k];
    forth[k] = k == last || few ? nullptr : memory.take(matrices(m) * panels(m.made) * m.summed * PANEL);
    back[k] = (k || dx) && !few ? memory.take(matrices(m) * panels(m.summed) * m.made * PANEL) : nullptr;
    size[k] = numbers(m);
    sums[k] = dweights[k] && !few ? memory.take(call.threads * size[k]) : nullptr;
  }
  float *states = memory.take(call.threads * (call.count + 3) * step * wide);
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
    int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t k = 0; k <= last; k++) {
#pragma omp for schedule(static) nowait
      for (int64_t b = 0; b < matrices(call.maps[k]); b++) {
        if (forth[k]) pack_forward(call.maps[k], call.weights[k], b, forth[k]);
        if (back[k]) pack_backward(call.maps[k], call.weights[k], b, back[k]);
      }
    }
#pragma omp barrier
    float *state = states + thread * (call.count + 3) * step * wide;
    float *one = state + call.count * step * wide, *two = one + step * wide, *three = two + step * wide;
    int64_t groups = (call.tokens + step - 1) / step, begin = groups * thread / team;
    int64_t end = groups * (thread + 1) / team;
    float *mine[call.count];  // the first thread's in place, where numbers are float32
    for (int64_t k = 0; k <= last; k++) {
      mine[k] = !sums[k] ? nullptr : !thread && direct(dweights[k]) ? direct(dweights[k]) : sums[k] + thread * size[k];
      if (mine[k] && begin == end) memset(mine[k], 0, sizeof(float) * size[k]);
    }
    for (int64_t g = begin; g < end; g++) {
      int64_t start = g * step, rows = least(call.tokens - start, step);
      const float *ins[call.count];
      for (int64_t i = 0; i < rows; i++) widen(call.x + (start + i) * call.ldx, one + i * wide, inputs(call.maps[0]));
      for (int64_t k = 0; k <= last; k++) {
        const Map &m = call.maps[k];
        float *here = state + k * step * wide;
        if (m.turned) ins[k] = gathered(m, rows, one, wide, here, wide);
        else {
          for (int64_t i = 0; i < rows; i++) memcpy(here + i * wide, one + i * wide, sizeof(float) * inputs(m));
          ins[k] = here;
        }
        if (k == last) break;
        if (few) for (int64_t b = 0; b < m.slices; b++) apply_few(m, call.weights[k], b, rows, here, wide, one, wide);
        else forth_by(slicewise(m), forth[k], rows, here, wide, one, wide);
      }
      for (int64_t i = 0; i < rows; i++) widen(grad + (start + i) * ldg, two + i * wide, outputs(call.maps[last]));
      for (int64_t k = last; k >= 0; k--) {
        const Map &m = call.maps[k];
        if (few && dweights[k]) outer_few(m, rows, two, wide, ins[k], wide, dweights[k]);
        if (mine[k]) weights_by(m, rows, two, wide, ins[k], wide, mine[k], g > begin, three);
        if (!k && !dx) break;
        if (few) back_few(m, call.weights[k], rows, two, wide, three, wide);
        else back_by(m, back[k], rows, two, wide, three, wide);
        scattered(m, rows, three, wide, two, wide);
      }
      if (dx) finish(two, wide, (const T *)nullptr, rows, inputs(call.maps[0]), dx + start * inputs(call.maps[0]));
    }
#pragma omp barrier
    for (int64_t k = 0; k <= last; k++) {
      if (!sums[k] || (direct(dweights[k]) && team == 1)) continue;
      const float *first = direct(dweights[k]) ? direct(dweights[k]) : sums[k];
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < size[k]; i += V) {
        int64_t valid = least(size[k] - i, V);
        float sum[V] = {};
        for (int64_t t = 0; t < team; t++) {
          const float *part = (t ? sums[k] + t * size[k] : first) + i;
          if (valid == V) store(sum, load(sum) + load(part));
          else for (int64_t j = 0; j < valid; j++) sum[j] += part[j];
        }
        narrow(sum, dweights[k] + i, valid);
      }
    }
  }
}

// How many numbers `memory` must hold.
extern "C" int64_t einlinear_forward_memory(int64_t count, const Map *maps, int64_t tokens, int64_t threads,
                                            const int64_t *plan) {
  if (by_pairs(tokens, plan)) return pairs_memory(count, maps, threads, plan);
  if (tokens < FEW && !shares(maps, count)) return 3 * (FEW * widest(maps, count) + V);
  int64_t found = threads * 2 * ROWS * widest(maps, count) + PANEL;
  for (int64_t k = 0; k < count; k++) found += matrices(maps[k]) * panels(maps[k].made) * maps[k].summed * PANEL + V;
  return found;
}

extern "C" int64_t einlinear_backward_memory(int64_t count, const Map *maps, int64_t tokens, int64_t threads,
                                             const int64_t *plan) {
  if (by_pairs(tokens, plan)) return pairs_backward_memory(count, maps, threads, plan);
  int64_t found = threads * (count + 3) * group(maps, count) * widest(maps, count) + PANEL;  // panels may overrun
  for (int64_t k = 0; k < count; k++) {
    const Map &m = maps[k];
    found += matrices(m) * (panels(m.made) * m.summed + panels(m.summed) * m.made) * PANEL + 2 * V;
    found += threads * numbers(m) + V;
  }
  return found;
}

// How bfloat16 goes by pairs, for all calls of these maps. Returns its bytes, or 0 where it does not; `plan` may be null.
extern "C" int64_t einlinear_plan(int64_t count, const Map *maps, int64_t *plan) { return plans(count, maps, plan); }

#define CALL(name, T)                                                                                                    \
  extern "C" void einlinear_forward_##name(int64_t count, const Map *maps, const T *const *weights, const T *x,           \
                                           int64_t ldx, const T *bias, T *y, int64_t tokens, int64_t threads,             \
                                           float *memory, const int64_t *plan) {                                          \
    Call<T> call = {count, tokens, threads, maps, weights, x, bias, ldx, memory, plan};                                   \
    if (by_pairs(tokens, plan)) forward_pairs(call, y);                                                                  \
    else if (tokens < FEW && !shares(maps, count)) forward_few(call, y);                                                 \
    else forward_many(call, y);                                                                                          \
  }                                                                                                                      \
  extern "C" void einlinear_backward_##name(int64_t count, const Map *maps, const T *const *weights, const T *x,         \
                                            int64_t ldx, const T *grad, int64_t ldg, T *dx, T *const *dweights,          \
                                            int64_t tokens, int64_t threads, float *memory, const int64_t *plan) {       \
    Call<T> call = {count, tokens, tokens < FEW ? 1 : threads, maps, weights, x, nullptr, ldx, memory, plan};            \
    if (by_pairs(tokens, plan)) backward_pairs(call, grad, ldg, dx, dweights);                                           \
    else backward(call, grad, ldg, dx, dweights);                                                                        \
  }

CALL(float32, float)
CALL(bfloat16, bfloat16)
CALL(float16, _Float16)
