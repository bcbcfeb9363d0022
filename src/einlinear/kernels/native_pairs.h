// The chain in bfloat16 by pairs (native_tiles.h), forward and backward. Included by native.cpp.

#include "native_tiles.h"

// Lines of an input, and rows of a result.

INLINE words paired(vec low, vec high) {  // rounded to nearest even
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (words)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

static void read_lines(const Map &m, const bfloat16 *x, int64_t ldx, int64_t tokens, words *to) {
  int64_t depth = deep(m.summed) / 2, whole = m.turned ? 0 : m.summed / 2;
  for (int64_t b = 0; b < m.slices; b++, to += depth) {
    for (int64_t p = 0; p < whole; p += LANES) {  // two neighbours of a row are one word
      int64_t valid = least(whole - p, LANES);
      vec r[LANES] = {};
      const bfloat16 *from = x + b * m.summed + 2 * p;
      UNROLL for (int i = 0; i < LANES; i++)
        if (i < tokens) r[i] = (vec)_mm512_maskz_loadu_ps((1 << valid) - 1, from + i * ldx);
      turn(r);
      UNROLL for (int i = 0; i < LANES; i++)
        if (i < valid) to[p + i] = (words)r[i];
    }
    for (int64_t k = 2 * whole; k < m.summed; k++)  // what is turned, and the last of an odd number
      for (int64_t i = 0; i < LANES; i++) {
        uint16_t bits = i < tokens ? x[i * ldx + (m.turned ? k * m.slices + b : b * m.summed + k)].bits : 0;
        ((uint16_t *)(to + k / 2))[2 * i + k % 2] = bits;
        if (k % 2 == 0) ((uint16_t *)(to + k / 2))[2 * i + 1] = 0;
      }
  }
}

// Where what is made of some tokens goes: lines of the next state, or, if there are none, rows of y.
struct Out {
  words *state;
  int64_t length;  // lines of 16 tokens
  const float *bias;  // zeros where there is none
  int64_t tokens;
  bfloat16 *y;
  int64_t ldy;
};

static void pass_on(const Job &job, const vec *c, words *to) {
  if (job.count == LANES && job.paired) {
    UNROLL for (int i = 0; i < LANES; i++) to[job.line[i]] = paired(c[i], c[LANES + i]);
    return;
  }
  for (int64_t i = 0; i < job.count; i++) to[job.line[i]] = paired(c[i], job.paired ? c[LANES + i] : (vec){});
}

static void give_out(const Job &job, const vec *c, const Out &out, int64_t start) {
  vec r[LANES];
  UNROLL for (int i = 0; i < LANES; i++) {
    const float *added = out.bias + 2 * job.line[i];
    r[i] = (vec)paired(c[i] + added[0], c[LANES + i] + added[1]);
  }
  turn(r);
  int64_t tokens = least(out.tokens - start, LANES), size = job.paired ? 2 * sizeof(bfloat16) : sizeof(bfloat16);
  bfloat16 *y = out.y + start * out.ldy;
  for (int64_t i = 0; i < tokens; i++, y += out.ldy) {
    if (job.paired && job.together) _mm512_mask_storeu_ps(y + 2 * job.line[0], (1 << job.count) - 1, (__m512)r[i]);
    else
      for (int64_t j = 0; j < job.count; j++) memcpy(y + 2 * job.line[j], (uint32_t *)&r[i] + j, size);
  }
}

// A map on `tiles` of tokens, of which `from` has the lines.
static void carry_out(const Map &m, const Job *jobs, int64_t number, const Weights &w, const bfloat16 *copies,
                      const words *from, int64_t tiles, const Out &out) {
  int64_t depth = deep(m.summed), length = lines(m.slices, m.summed);
  for (const Job *job = jobs; job < jobs + number; job++, copies += 2 * LANES * copied(m)) {
    Rows rows = rows_of(m, *job, w, copies);
    for (int64_t t = 0; t < tiles; t += 2) {
      int64_t both = least(tiles - t, 2);
      alignas(64) vec c[4 * LANES];
      const words *state = from + t * length;
      multiply(rows, job->count, state + job->one * depth / 2, state + job->other * depth / 2, both, length, depth, c);
      for (int64_t u = 0; u < both; u++) {
        if (out.state) pass_on(*job, c + 2 * LANES * u, out.state + (t + u) * out.length);
        else give_out(*job, c + 2 * LANES * u, out, (t + u) * LANES);
      }
    }
  }
}

static void read_tiles(const Map &m, const bfloat16 *x, int64_t ldx, int64_t tokens, int64_t tiles, words *to) {
  for (int64_t t = 0; t < tiles; t++, to += lines(m.slices, m.summed))
    read_lines(m, x + t * LANES * ldx, ldx, least(tokens - t * LANES, LANES), to);
}

static void forward_pairs(const Call<bfloat16> &call, bfloat16 *y) {
  int64_t last = call.count - 1, width = outputs(call.maps[last]), size = 0, blank = 0;
  int64_t tiles = (call.tokens + LANES - 1) / LANES, together = least((tiles + call.threads - 1) / call.threads, TILES);
  Memory memory = {call.memory};
  const Job *jobs[call.count];
  Weights weights[call.count];
  bfloat16 *copies[call.count];
  int64_t length[call.count];
  for (int64_t k = 0; k <= last; k++) {
    const Map &m = call.maps[k];
    jobs[k] = k ? jobs[k - 1] + call.plan[k - 1] : (const Job *)(call.plan + 2 * call.count);
    weights[k] = {call.weights[k], m.made * m.summed, m.summed};
    copies[k] = (bfloat16 *)memory.take(call.plan[k] * LANES * copied(m));
    length[k] = lines(m.slices, m.summed);
    size += together * length[k];
    blank |= m.summed % DEPTH;
  }
  float *bias = memory.take(width + 1);
  memset(bias, 0, sizeof(float) * (width + 1));
  if (call.bias) widen(call.bias, bias, width);
  words *states = (words *)memory.take(call.threads * size * LANES);
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
    words *state[call.count], *free_ = states + omp_get_thread_num() * size;
    if (blank) memset(free_, 0, size * sizeof(words));
    for (int64_t k = 0; k <= last; free_ += together * length[k++]) {
      state[k] = free_;
#pragma omp for schedule(static) nowait
      for (int64_t j = 0; j < call.plan[k]; j++)
        lay_out(call.maps[k], jobs[k][j], weights[k], copies[k] + j * 2 * LANES * copied(call.maps[k]));
    }
    begin_tiles();
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t start = 0; start < tiles; start += together) {
      int64_t here = least(tiles - start, together), token = start * LANES;
      read_tiles(call.maps[0], call.x + token * call.ldx, call.ldx, call.tokens - token, here, state[0]);
      for (int64_t k = 0; k <= last; k++) {
        Out out = {k < last ? state[k + 1] : nullptr, k < last ? length[k + 1] : 0, bias, call.tokens - token,
                   y + token * width, width};
        carry_out(call.maps[k], jobs[k], call.plan[k], weights[k], copies[k], state[k], here, out);
      }
    }
    end_tiles();
  }
}

// The other way. Gradients of weights are products over tokens: of rows, [feature][token], by blocks of 16 features, whose
// lines hold two neighbouring tokens. Both are made of lines by shuffling.

enum { GROUP = TILES * LANES };  // tokens that the backward takes at a time

// Of two tiles' lines, a row of 32 tokens for each feature.
static void to_rows(const words *lines, int64_t length, int64_t pairs, bfloat16 *rows, int64_t apart) {
  alignas(64) static const uint16_t even[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  __m512i low = _mm512_load_si512(even), high = _mm512_add_epi16(low, _mm512_set1_epi16(1));
  for (int64_t p = 0; p < pairs; p++, rows += 2 * apart) {
    __m512i first = (__m512i)lines[p], second = (__m512i)lines[length + p];
    _mm512_storeu_si512(rows, _mm512_permutex2var_epi16(first, low, second));
    _mm512_storeu_si512(rows + apart, _mm512_permutex2var_epi16(first, high, second));
  }
}

// [feature / 16][token / 2][feature % 16][token % 2]; features beyond the last whole 16 are anything.
static void to_blocks(const bfloat16 *rows, int64_t features, int64_t tokens, words *blocks) {
  for (int64_t f = 0; f < features; f += LANES, rows += LANES * GROUP, blocks += GROUP / 2)
    for (int64_t t = 0; t < tokens; t += 32) {
      vec r[LANES];
      UNROLL for (int i = 0; i < LANES; i++) r[i] = (vec)_mm512_loadu_ps(rows + i * GROUP + t);
      turn(r);
      UNROLL for (int i = 0; i < LANES; i++) blocks[t / 2 + i] = (words)r[i];
    }
}

static int64_t sixteens(int64_t features) { return (features + LANES - 1) / LANES * LANES; }

// The gradient of one slice's W, [made][sixteens(summed)], from `tokens`' dout and in; the last three are memory for it.
static void weights_by_pairs(const Map &m, int64_t tokens, const words *dout, int64_t ldo, const words *in, int64_t ldi,
                             float *sums, bool add, bfloat16 *rows, bfloat16 *others, words *blocks) {
  for (int64_t t = 0; t < tokens / LANES; t += 2) {
    to_rows(dout + t * ldo, ldo, (m.made + 1) / 2, rows + t * LANES, GROUP);
    to_rows(in + t * ldi, ldi, (m.summed + 1) / 2, others + t * LANES, GROUP);
  }
  to_blocks(others, m.summed, tokens, blocks);
  int64_t wide = sixteens(m.summed), beyond = GROUP / 2;
  for (int64_t n = 0; n < m.made; n += 2 * LANES) {
    Rows left = {rows + n * GROUP, rows + (n + LANES) * GROUP, GROUP};
    for (int64_t k = 0; k < wide; k += 2 * LANES) {
      alignas(64) vec c[4 * LANES];
      int64_t both = least((wide - k) / LANES, 2);
      multiply(left, LANES, blocks + k / LANES * beyond, blocks + k / LANES * beyond, both, beyond, tokens, c);
      for (int64_t t = 0; t < both; t++)
        for (int64_t i = 0; i < least(m.made - n, 2 * LANES); i++) {
          float *place = sums + (n + i) * wide + k + t * LANES;
          store(place, add ? load(place) + c[2 * LANES * t + i] : c[2 * LANES * t + i]);
        }
    }
  }
}

// W's transpose, [slice][summed, made even][made, and zeros], of which this is what 32 rows of W give.
static void transpose_rows(const Map &m, const bfloat16 *weight, int64_t part, bfloat16 *to, words *free_) {
  int64_t parts = (m.made + 31) / 32, b = part / parts, n = part % parts * 32, apart = copied(reversed(m));
  Map whole = {1, 0, m.summed, 0, 0, 1};
  const bfloat16 *from = weight + (b * m.made + n) * m.summed;
  read_tiles(whole, from, m.summed, m.made - n, 2, free_);
  to_rows(free_, lines(1, m.summed), (m.summed + 1) / 2, to + b * (m.summed + m.summed % 2) * apart + n, apart);
}

static void backward_pairs(const Call<bfloat16> &call, const bfloat16 *grad, int64_t ldg, bfloat16 *dx,
                           bfloat16 *const *dweights) {
  int64_t count = call.count, last = count - 1, blank = 0, size = 0, rows_size = 0, blocks_size = 0;
  Memory memory = {call.memory};
  const Job *jobs[count], *back[count];
  Weights weights[count], turned[count];
  bfloat16 *copies[count], *others[count];
  int64_t length[count], upward[count], counted[count];
  float *sums[count];
  const Job *next = (const Job *)(call.plan + 2 * count);
  for (int64_t j = 0; j < 2 * count; j++) {
    int64_t k = j % count;
    (j < count ? jobs : back)[k] = next;
    next += call.plan[j];
  }
  for (int64_t k = 0; k <= last; k++) {
    const Map &m = call.maps[k], r = reversed(m);
    weights[k] = {call.weights[k], m.made * m.summed, m.summed};
    bfloat16 *flipped = (bfloat16 *)memory.take(m.slices * (m.summed + 1) * copied(r) / 2);
    turned[k] = {flipped, (m.summed + m.summed % 2) * copied(r), copied(r)};
    copies[k] = (bfloat16 *)memory.take(call.plan[k] * LANES * copied(m));
    others[k] = (bfloat16 *)memory.take(call.plan[count + k] * LANES * copied(r));
    length[k] = lines(m.slices, m.summed), upward[k] = lines(m.slices, m.made);
    counted[k] = m.slices * m.made * sixteens(m.summed);
    sums[k] = dweights[k] ? memory.take(call.threads * counted[k]) : nullptr;
    size += TILES * (length[k] + upward[k]);
    rows_size = most(rows_size, (most(m.made, m.summed) + 2 * LANES) * GROUP);
    blocks_size = most(blocks_size, most(sixteens(m.summed) * GROUP / 2 / LANES, 2 * lines(1, m.summed)));
    blank |= m.summed % DEPTH | m.made % DEPTH;
  }
  int64_t own = size * LANES + rows_size + blocks_size * LANES;  // two bfloat16 to a number, and two pieces of rows
  float *states = memory.take(call.threads * own), *none = memory.take(inputs(call.maps[0]) + 1);
  memset(none, 0, sizeof(float) * (inputs(call.maps[0]) + 1));
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
    int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    words *state[count], *dstate[count], *free_ = (words *)(states + thread * own);
    if (blank) memset(free_, 0, size * sizeof(words));
    for (int64_t k = 0; k <= last; k++) {
      state[k] = free_, dstate[k] = free_ + TILES * length[k];
      free_ += TILES * (length[k] + upward[k]);
    }
    bfloat16 *rows = (bfloat16 *)free_, *more = rows + rows_size;
    words *blocks = free_ + rows_size / LANES;
    for (int64_t k = 0; k <= last; k++) {
      const Map &m = call.maps[k];
      if (k < last)
#pragma omp for schedule(static) nowait
        for (int64_t j = 0; j < call.plan[k]; j++)
          lay_out(m, jobs[k][j], weights[k], copies[k] + j * 2 * LANES * copied(m));
      if (!k && !dx) continue;
#pragma omp for schedule(static)
      for (int64_t part = 0; part < m.slices * ((m.made + 31) / 32); part++)
        transpose_rows(m, call.weights[k], part, (bfloat16 *)turned[k].start, blocks);
#pragma omp for schedule(static) nowait
      for (int64_t j = 0; j < call.plan[count + k]; j++)
        lay_out(reversed(m), back[k][j], turned[k], others[k] + j * 2 * LANES * copied(reversed(m)));
    }
    begin_tiles();
#pragma omp barrier
    int64_t groups = (call.tokens + GROUP - 1) / GROUP, begin = groups * thread / team, end = groups * (thread + 1) / team;
    for (int64_t k = 0; k <= last; k++)
      if (sums[k] && begin == end) memset(sums[k] + thread * counted[k], 0, sizeof(float) * counted[k]);
    for (int64_t g = begin; g < end; g++) {
      int64_t token = g * GROUP, tokens = call.tokens - token;
      int64_t tiles = least((tokens + LANES - 1) / LANES, TILES), even = tiles + tiles % 2;
      for (int64_t k = 0; even > tiles && k <= last; k++) {
        memset(state[k] + tiles * length[k], 0, length[k] * sizeof(words));
        memset(dstate[k] + tiles * upward[k], 0, upward[k] * sizeof(words));
      }
      read_tiles(call.maps[0], call.x + token * call.ldx, call.ldx, tokens, tiles, state[0]);
      for (int64_t k = 0; k < last; k++)
        carry_out(call.maps[k], jobs[k], call.plan[k], weights[k], copies[k], state[k], tiles,
                  {state[k + 1], length[k + 1], none, 0, nullptr, 0});
      read_tiles(reversed(call.maps[last]), grad + token * ldg, ldg, tokens, tiles, dstate[last]);
      for (int64_t k = last; k >= 0; k--) {
        const Map &m = call.maps[k];
        int64_t into = deep(m.summed) / 2, outof = deep(m.made) / 2, part = m.made * sixteens(m.summed);
        for (int64_t b = 0; sums[k] && b < m.slices; b++)
          weights_by_pairs(m, even * LANES, dstate[k] + b * outof, upward[k], state[k] + b * into, length[k],
                           sums[k] + thread * counted[k] + b * part, g > begin, rows, more, blocks);
        if (!k && !dx) break;
        Out out = {k ? dstate[k - 1] : nullptr, k ? upward[k - 1] : 0, none, tokens, dx + token * inputs(m), inputs(m)};
        carry_out(reversed(m), back[k], call.plan[count + k], turned[k], others[k], dstate[k], tiles, out);
      }
    }
    end_tiles();
#pragma omp barrier
    for (int64_t k = 0; k <= last; k++) {
      if (!sums[k]) continue;
      const Map &m = call.maps[k];
      int64_t wide = sixteens(m.summed);
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < m.slices * m.made; n++)
        for (int64_t i = 0; i < m.summed; i += V) {
          vec sum = {};
          for (int64_t t = 0; t < team; t++) sum += load(sums[k] + t * counted[k] + n * wide + i);
          narrow((const float *)&sum, dweights[k] + n * m.summed + i, least(m.summed - i, V));
        }
    }
  }
}

static int64_t pairs_memory(int64_t count, const Map *maps, int64_t threads, const int64_t *plan) {
  int64_t found = outputs(maps[count - 1]) + 4 * LANES;
  for (int64_t k = 0; k < count; k++) {
    found += plan[k] * LANES * copied(maps[k]) + V;
    found += threads * TILES * lines(maps[k].slices, maps[k].summed) * LANES;
  }
  return found;
}

static int64_t pairs_backward_memory(int64_t count, const Map *maps, int64_t threads, const int64_t *plan) {
  int64_t found = inputs(maps[0]) + 4 * LANES, rows = 0, blocks = 0;
  for (int64_t k = 0; k < count; k++) {
    const Map &m = maps[k], r = reversed(m);
    found += m.slices * (m.summed + 1) * copied(r) / 2 + plan[k] * LANES * copied(m) + plan[count + k] * LANES * copied(r);
    found += threads * m.slices * m.made * sixteens(m.summed) + 4 * V;
    found += threads * TILES * (lines(m.slices, m.summed) + lines(m.slices, m.made)) * LANES;
    rows = most(rows, (most(m.made, m.summed) + 2 * LANES) * GROUP);
    blocks = most(blocks, most(sixteens(m.summed) * GROUP / 2 / LANES, 2 * lines(1, m.summed)));
  }
  return found + threads * (rows + blocks * LANES) + V;
}
