// One map, forward and backward, of many tokens and of few, which are rows. Included by native.cpp.

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

// A chain on some tokens.

template <class T> struct Call {
  int64_t count, tokens, threads;
  const Map *maps;
  const T *const *weights;
  const T *x, *bias;
  int64_t ldx;
  float *memory;
  const int64_t *plan;  // of pairs, or null
};
