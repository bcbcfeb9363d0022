// A chain of block-diagonal maps and its derivative, a few tokens at a time. Compiled where it runs (toolchain.py).
//
// Tokens are rows. Of each map, out[b * made + n] is the sum over k of W[b][n][k] * in[turned ? k * slices + b : b *
// summed + k]; where parts of the input share one W, out[(b * made + n) * inner + q] that of W[n][k] * in[(b * summed + k)
// * inner + q]. What lies between two maps is float32 and does not leave the cache. One small product of a few rows and a
// panel of columns, held in registers, does all the work: forward, for the gradient of the input and for those of weights.

#include "native_numbers.h"

#include "native_maps.h"

// Both ways.

static int64_t widest(const Map *maps, int64_t count) {
  int64_t found = 0;
  for (int64_t k = 0; k < count; k++) found = most(found, padded(most(inputs(maps[k]), outputs(maps[k]))));
  return found;
}

enum { AT_ONCE = 4 * ROWS };  // tokens of which the backward keeps all states

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
  int64_t wide = widest(call.maps, call.count), last = call.count - 1, step = AT_ONCE;
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
  int64_t found = threads * (count + 3) * AT_ONCE * widest(maps, count) + PANEL;  // panels may overrun
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
