// The chain in bfloat16 by instructions that multiply pairs of numbers: AMX tiles, or vdpbf16ps. Forward alone.
//
// Tokens are columns here. A state is a list of lines, one of two neighbouring features of 16 tokens, [token][2], as
// both instructions read them; the weights are the other operand, and are read where they lie, 16 rows at a time. What a
// map makes is rounded to bfloat16, and written as those lines that the next one reads: so that no order of features
// costs anything, and only input and output are transposed. Included by native.cpp.

#include <immintrin.h>

enum { LANES = 16, TILES = 4 };  // tokens of a line, and rows of a tile; lines of tokens that share weights

// Tile instructions, asked of the system once; under EMULATE_TILES what they do, in plain C++, for tests. And the part of
// what is multiplied that must not be padding, for this to be the fastest way.

#if defined(EMULATE_TILES)
#define HAS_TILES
namespace emulated {
struct Tile { uint8_t row[16][64]; };
static thread_local Tile tiles[8];
static thread_local uint8_t rows[8], bytes[8];
static void configure(const void *from) {
  for (int t = 0; t < 8; t++) bytes[t] = ((const uint8_t *)from)[16 + 2 * t], rows[t] = ((const uint8_t *)from)[48 + t];
}
static void release() { memset(rows, 0, 8), memset(bytes, 0, 8); }
static void zero(int t) { memset(&tiles[t], 0, sizeof(Tile)); }
static void load(int t, const void *from, int64_t stride) {
  for (int i = 0; i < rows[t]; i++) memcpy(tiles[t].row[i], (const char *)from + i * stride, bytes[t]);
}
static void store(int t, void *to, int64_t stride) {
  for (int i = 0; i < rows[t]; i++) memcpy((char *)to + i * stride, tiles[t].row[i], bytes[t]);
}
static void multiply(int c, int a, int b) {
  for (int i = 0; i < rows[c]; i++)
    for (int p = 0; p < rows[b]; p++)
      for (int j = 0; j < bytes[c] / 4; j++)
        for (int half = 0; half < 2; half++) {
          float left = widened(((bfloat16 *)tiles[a].row[i])[2 * p + half]);
          ((float *)tiles[c].row[i])[j] += left * widened(((bfloat16 *)tiles[b].row[p])[2 * j + half]);
        }
}
}
#define tile_configure emulated::configure
#define tile_release emulated::release
#define tile_zero emulated::zero
#define tile_load emulated::load
#define tile_store emulated::store
#define tile_multiply emulated::multiply
static const bool permitted = true;
static const double useful = 0;  // any shape
#elif defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#define tile_configure _tile_loadconfig
#define tile_release _tile_release
#define tile_zero _tile_zero
#define tile_load _tile_loadd
#define tile_store _tile_stored
#define tile_multiply _tile_dpbf16ps
static const bool permitted = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */);
static const double useful = permitted ? 0.2 : 0.6;
#else
static const bool permitted = false;
static const double useful = 0.6;
#endif
static const int64_t DEPTH = permitted ? 32 : 2;  // features of a step

// What a map makes, 16 pairs of rows at a time.

struct Reading { int64_t slices, summed, turned; };  // of features: by the next map, or by the result

static int64_t deep(int64_t summed) { return (summed + DEPTH - 1) / DEPTH * DEPTH; }
static int64_t lines(int64_t slices, int64_t summed) { return slices * deep(summed) / 2; }

// Pairs of what a map makes that are neighbours for its reader: `count` lines, of rows of one slice and of another's.
struct Job {
  int64_t count, stride;  // rows of W are `stride` apart, the first ones `row` and `partner` of the slices `one` and `other`
  int64_t one, row, other, partner;
  int64_t feature, line, step;  // what the first row makes, and where the lines go
  int64_t paired;  // or there are no partners
};

static Reading reading(const Map *maps, int64_t count, int64_t k) {
  if (k + 1 == count) return {1, outputs(maps[k]), 0};
  return {maps[k + 1].slices, maps[k + 1].summed, maps[k + 1].turned};
}

// How many jobs, and which, if `found` is not null: either along what a slice of the next map sums over, or across slices.
static int64_t jobs_of(const Map &m, const Reading &next, bool across, Job *found) {
  int64_t halves = (next.summed + 1) / 2, far = next.turned ? next.slices : 1, number = 0;  // how far neighbours lie apart
  int64_t outer = across ? halves : next.slices, run = across ? next.slices : halves, stride = across ? 1 : 2 * far;
  for (int64_t o = 0; o < outer; o++)
    for (int64_t i = 0, count; i < run; i += count, number++) {
      int64_t k = 2 * (across ? o : i), b = across ? i : o, paired = k + 1 < next.summed;
      int64_t feature = next.turned ? k * next.slices + b : b * next.summed + k, beside = feature + (paired ? far : 0);
      int64_t row = feature % m.made, partner = beside % m.made;
      count = least(least(LANES, run - i), (m.made - (row > partner ? row : partner) + stride - 1) / stride);
      if (!across && paired) count = least(count, (next.summed - k) / 2);
      if (found)
        found[number] = {count, stride, feature / m.made, row, beside / m.made, partner, feature,
                         b * deep(next.summed) / 2 + k / 2, across ? deep(next.summed) / 2 : 1, paired};
    }
  return number;
}

// The plans of a chain: how many jobs each map has, and then all of them. Returns its bytes; none, if most of what is
// multiplied were padding, or if parts of an input share weights.
static int64_t plans(int64_t count, const Map *maps, int64_t *found) {
  if (shares(maps, count)) return 0;
  int64_t total = 0;
  double wanted = 0, done = 0;
  for (int64_t k = 0; k < count; k++) {
    Reading next = reading(maps, count, k);
    int64_t along = jobs_of(maps[k], next, false, nullptr);
    int64_t across = next.turned ? jobs_of(maps[k], next, true, nullptr) : along + 1, number = least(along, across);
    if (found) jobs_of(maps[k], next, across < along, (Job *)(found + count) + total), found[k] = number;
    total += number;
    wanted += outputs(maps[k]) * maps[k].summed;
    done += 2 * LANES * number * deep(maps[k].summed);
  }
  return wanted < useful * done ? 0 : count * sizeof(int64_t) + total * sizeof(Job);
}

// The rows of a job, of its slices and of their partners: where they lie, if 16 fill whole steps, or a copy among zeros.
struct Rows { const bfloat16 *first, *second; int64_t apart; };

static bool lies_right(const Map &m, const Job &job) {  // vectors read from all rows in turn, which must not share a set
  return job.count == LANES && m.summed % DEPTH == 0 && (permitted || job.stride * m.summed % 256);
}
static int64_t copied(const Map &m) { return (deep(m.summed) + 31) / 32 * 32 | 32; }  // numbers from row to row

static Rows rows_of(const Map &m, const Job &job, const bfloat16 *weight, const bfloat16 *copy) {
  if (!lies_right(m, job)) return {copy, copy + LANES * copied(m), copied(m)};
  return {weight + (job.one * m.made + job.row) * m.summed, weight + (job.other * m.made + job.partner) * m.summed,
          job.stride * m.summed};
}

static void lay_out(const Map &m, const Job &job, const bfloat16 *weight, bfloat16 *copy) {
  if (lies_right(m, job)) return;
  if (job.count < LANES || deep(m.summed) > m.summed) memset(copy, 0, 2 * LANES * copied(m) * sizeof(bfloat16));
  for (int64_t i = 0; i < job.count; i++, copy += copied(m)) {
    const bfloat16 *first = weight + (job.one * m.made + job.row + i * job.stride) * m.summed;
    const bfloat16 *second = weight + (job.other * m.made + job.partner + i * job.stride) * m.summed;
    memcpy(copy, first, m.summed * sizeof(bfloat16));
    memcpy(copy + LANES * copied(m), second, m.summed * sizeof(bfloat16));
  }
}

// c[first or second][row][token] = rows by lines, of `depth` features.

template <int M> INLINE void by_vectors(const bfloat16 *rows, int64_t apart, const words *b, int64_t depth, vec *c) {
  vec sum[M] = {};
  for (int64_t p = 0; p < depth / 2; p++) {
    UNROLL for (int i = 0; i < M; i++) {
      uint32_t pair;
      memcpy(&pair, rows + i * apart + 2 * p, 4);
      sum[i] = (vec)_mm512_dpbf16_ps((__m512)sum[i], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b[p]);
    }
  }
  UNROLL for (int i = 0; i < M; i++) c[i] = sum[i];
}

static void by_vectors(const Rows &rows, int64_t count, const words *one, const words *other, int64_t depth, vec *c) {
  for (int half = 0; half < 2; half++, c += LANES) {
    const bfloat16 *w = half ? rows.second : rows.first;
    const words *b = half ? other : one;
    if (count > 12) by_vectors<16>(w, rows.apart, b, depth, c);
    else if (count > 8) by_vectors<12>(w, rows.apart, b, depth, c);
    else if (count > 4) by_vectors<8>(w, rows.apart, b, depth, c);
    else by_vectors<4>(w, rows.apart, b, depth, c);
  }
}

#ifdef HAS_TILES
// Some compilers' tile instructions do not say which memory they read: what was written must be there before.
INLINE void published(const void *memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

static void begin_tiles() {
  if (!permitted) return;
  alignas(64) uint8_t shape[64] = {1};
  for (int t = 0; t < 8; t++) shape[16 + 2 * t] = 64, shape[48 + t] = 16;
  published(shape);
  tile_configure(shape);
}
static void end_tiles() { if (permitted) tile_release(); }

// For one or two tiles of tokens, the second one's lines `beyond` those of the first.
template <bool two>
static void by_tiles(const Rows &rows, const words *one, const words *other, int64_t beyond, int64_t depth, vec *c) {
  int64_t apart = rows.apart * sizeof(bfloat16);
  published(one);
  tile_zero(0);
  tile_zero(1);
  tile_zero(2);
  tile_zero(3);
  for (int64_t k = 0; k < depth; k += 32, one += 16, other += 16) {
    tile_load(4, rows.first + k, apart);
    tile_load(6, one, sizeof(words));
    tile_multiply(0, 4, 6);
    if (two) {
      tile_load(7, one + beyond, sizeof(words));
      tile_multiply(2, 4, 7);
    }
    tile_load(5, rows.second + k, apart);
    if (one != other) tile_load(6, other, sizeof(words));
    tile_multiply(1, 5, 6);
    if (two) {
      if (one != other) tile_load(7, other + beyond, sizeof(words));
      tile_multiply(3, 5, 7);
    }
  }
  tile_store(0, c, sizeof(vec));
  tile_store(1, c + LANES, sizeof(vec));
  if (two) {
    tile_store(2, c + 2 * LANES, sizeof(vec));
    tile_store(3, c + 3 * LANES, sizeof(vec));
  }
}
#else
static void begin_tiles() {}
static void end_tiles() {}
template <bool two> static void by_tiles(const Rows &, const words *, const words *, int64_t, int64_t, vec *) {}
#endif

// For one or `both` of two tiles of tokens.
static void multiply(const Rows &rows, int64_t count, const words *one, const words *other, int64_t both, int64_t beyond,
                     int64_t depth, vec *c) {
  if (permitted && both > 1) by_tiles<true>(rows, one, other, beyond, depth, c);
  else if (permitted) by_tiles<false>(rows, one, other, beyond, depth, c);
  else
    for (int64_t t = 0; t < both; t++)
      by_vectors(rows, count, one + t * beyond, other + t * beyond, depth, c + t * 2 * LANES);
}

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

// What a job has made of 16 tokens, as the next map reads it.
static void pass_on(const Job &job, const vec *c, words *to) {
  to += job.line;
  if (job.count == LANES && job.paired) {
    UNROLL for (int i = 0; i < LANES; i++) to[i * job.step] = paired(c[i], c[LANES + i]);
    return;
  }
  for (int64_t i = 0; i < job.count; i++) to[i * job.step] = paired(c[i], job.paired ? c[LANES + i] : (vec){});
}

static void give_out(const Job &job, const vec *c, const float *bias, int64_t tokens, bfloat16 *y, int64_t ldy) {
  vec r[LANES];
  const float *added = bias + job.feature;  // of zeros where there is none
  UNROLL for (int i = 0; i < LANES; i++)
    r[i] = (vec)paired(c[i] + added[2 * i], c[LANES + i] + added[2 * i + 1]);
  turn(r);
  for (int64_t i = 0; i < tokens; i++, y += ldy) {
    if (job.paired) _mm512_mask_storeu_ps(y + job.feature, (1 << job.count) - 1, (__m512)r[i]);
    else memcpy(y + job.feature, &r[i], sizeof(bfloat16));
  }
}

static void forward_pairs(const Call<bfloat16> &call, bfloat16 *y) {
  int64_t last = call.count - 1, width = outputs(call.maps[last]), size = 0, blank = 0;
  int64_t tiles = (call.tokens + LANES - 1) / LANES, together = least((tiles + call.threads - 1) / call.threads, TILES);
  Memory memory = {call.memory};
  const Job *jobs[call.count];
  bfloat16 *copies[call.count];
  int64_t length[call.count];
  for (int64_t k = 0; k <= last; k++) {
    jobs[k] = k ? jobs[k - 1] + call.plan[k - 1] : (const Job *)(call.plan + call.count);
    copies[k] = (bfloat16 *)memory.take(call.plan[k] * LANES * copied(call.maps[k]));
    length[k] = lines(call.maps[k].slices, call.maps[k].summed);
    size += together * length[k];
    blank |= call.maps[k].summed % DEPTH;
  }
  float *bias = memory.take(width + 2 * LANES);
  memset(bias, 0, sizeof(float) * (width + 2 * LANES));
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
        lay_out(call.maps[k], jobs[k][j], call.weights[k], copies[k] + j * 2 * LANES * copied(call.maps[k]));
    }
    begin_tiles();
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t start = 0; start < tiles; start += together) {
      int64_t here = least(tiles - start, together);
      for (int64_t t = 0; t < here; t++) {
        int64_t token = (start + t) * LANES;
        read_lines(call.maps[0], call.x + token * call.ldx, call.ldx, least(call.tokens - token, LANES),
                   state[0] + t * length[0]);
      }
      for (int64_t k = 0; k <= last; k++) {
        const Map &m = call.maps[k];
        int64_t depth = deep(m.summed);
        for (int64_t j = 0; j < call.plan[k]; j++) {
          const Job &job = jobs[k][j];
          Rows rows = rows_of(m, job, call.weights[k], copies[k] + j * 2 * LANES * copied(m));
          for (int64_t t = 0; t < here; t += 2) {
            int64_t both = least(here - t, 2);
            alignas(64) vec c[4 * LANES];
            const words *from = state[k] + t * length[k];
            multiply(rows, job.count, from + job.one * depth / 2, from + job.other * depth / 2, both, length[k], depth, c);
            for (int64_t u = t; u < t + both; u++) {
              int64_t token = (start + u) * LANES;
              const vec *made = c + 2 * LANES * (u - t);
              if (k < last) pass_on(job, made, state[k + 1] + u * length[k + 1]);
              else give_out(job, made, bias, least(call.tokens - token, LANES), y + token * width, width);
            }
          }
        }
      }
    }
    end_tiles();
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
