// Products in bfloat16 by instructions that multiply pairs of numbers, AMX tiles or vdpbf16ps, and which parts of a map
// each makes.
//
// Tokens are columns here. A state is a list of lines, one of two neighbouring features of 16 tokens, [token][2], as
// both instructions read them; the weights are the other operand, and are read where they lie, 16 rows at a time. What a
// map makes is rounded to bfloat16, and written as those lines that the next one reads: so that no order of features
// costs anything, and only input and output are transposed. Included by native_pairs.h.

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

static bool by_pairs(int64_t tokens, const int64_t *plan) { return plan && tokens >= (permitted ? 1 : FEW); }

// What a map makes, 16 pairs of rows at a time.

struct Reading { int64_t slices, summed, turned; };  // of features: by the next map, or by the result

static int64_t deep(int64_t summed) { return (summed + DEPTH - 1) / DEPTH * DEPTH; }
static int64_t lines(int64_t slices, int64_t summed) { return slices * deep(summed) / 2; }

// Pairs of what a map makes that are neighbours for its reader: `count` lines, of rows of one slice and of another's.
struct Job {
  int64_t count, stride;  // rows of W are `stride` apart, the first ones `row` and `partner` of the slices `one` and `other`
  int64_t one, row, other, partner;
  int32_t paired;  // or there are no partners
  int32_t together;  // its lines lie one after the other
  int32_t line[LANES];
};

static Map reversed(const Map &m) { return {m.slices, m.summed, m.made, 0, 0, 1}; }
static Reading onward(const Map *maps, int64_t count, int64_t k) {
  if (k + 1 == count) return {1, outputs(maps[k]), 0};
  return {maps[k + 1].slices, maps[k + 1].summed, maps[k + 1].turned};
}
static Reading backward(const Map *maps, int64_t k) {
  if (!k) return {1, inputs(maps[k]), 0};
  return {maps[k - 1].slices, maps[k - 1].made, 0};
}

// The job of rows from `row` on, of which `taken` are others' already. Features are made slice after slice, or, if
// `across`, with slices innermost, as the gradient is of what was read so.
static Job job_of(const Map &m, bool across, const Reading &next, int64_t b, int64_t row, int64_t stride, const bool *taken) {
  Job job = {0, stride, b, row, b, row, 0, 1, {}};
  int64_t far = next.turned ? next.slices : 1;  // how far neighbours lie apart
  for (int64_t n = row; n < m.made && job.count < LANES && !taken[n]; n += stride, job.count++) {
    int64_t feature = across ? n * m.slices + b : b * m.made + n;
    int64_t k = next.turned ? feature / next.slices : feature % next.summed;
    int64_t slice = next.turned ? feature % next.slices : feature / next.summed;
    if (k % 2) break;  // a partner
    bool paired = k + 1 < next.summed;
    int64_t beside = paired ? feature + far : feature;
    int64_t other = across ? beside % m.slices : beside / m.made, partner = across ? beside / m.slices : beside % m.made;
    if (!job.count) job.paired = paired, job.other = other, job.partner = partner;
    else if (paired != job.paired || other != job.other || partner - n != job.partner - row) break;
    job.line[job.count] = slice * deep(next.summed) / 2 + k / 2;
    job.together &= job.line[job.count] == job.line[0] + job.count;
  }
  return job;
}

static int64_t jobs_of(const Map &m, bool across, const Reading &next, Job *found) {  // how many; `found` may be null
  int64_t number = 0, strides[] = {1, 2, next.turned ? 2 * next.slices : 2};
  for (int64_t b = 0; b < m.slices; b++) {
    bool taken[m.made];
    memset(taken, 0, m.made);
    for (int64_t n = 0; n < m.made; n++) {
      if (taken[n]) continue;
      Job best = {};
      for (int64_t stride : strides) {
        Job job = job_of(m, across, next, b, n, stride, taken);
        if (job.count > best.count) best = job;
      }
      for (int64_t i = 0; i < best.count; i++) taken[n + i * best.stride] = true;
      if (!best.count) continue;
      if (found) found[number] = best;
      number++;
    }
  }
  return number;
}

// How a chain goes: how many jobs each map has forward, and then backward, and then all of them. Returns its bytes; none,
// if most of what is multiplied were padding, or if parts of an input share weights.
static int64_t plans(int64_t count, const Map *maps, int64_t *found) {
  if (shares(maps, count)) return 0;
  int64_t total = 0;
  double wanted = 0, done = 0;
  for (int64_t j = 0; j < 2 * count; j++) {
    bool back = j >= count;
    int64_t k = back ? j - count : j;
    Map m = back ? reversed(maps[k]) : maps[k];
    Job *here = found ? (Job *)(found + 2 * count) + total : nullptr;
    int64_t number = jobs_of(m, back && maps[k].turned, back ? backward(maps, k) : onward(maps, count, k), here);
    if (found) found[j] = number;
    total += number;
    wanted += numbers(m);
    done += 2 * LANES * number * deep(m.summed);
  }
  return wanted < useful * done ? 0 : 2 * count * sizeof(int64_t) + total * sizeof(Job);
}

// Weights, [slice][row][summed], `slice` and `row` apart; behind each row may be zeros.
struct Weights { const bfloat16 *start; int64_t slice, row; };

// The rows of a job, of its slices and of their partners: where they lie, if 16 fill whole steps, or a copy among zeros.
struct Rows { const bfloat16 *first, *second; int64_t apart; };

static bool lies_right(const Map &m, const Job &job, const Weights &w) {  // vectors read from all rows in turn, which must
  return job.count == LANES && w.row >= deep(m.summed) && (permitted || job.stride * w.row % 256);  // not share a set
}
static int64_t copied(const Map &m) { return (deep(m.summed) + 31) / 32 * 32 | 32; }  // numbers from row to row

static Rows where_they_lie(const Job &job, const Weights &w) {
  return {w.start + job.one * w.slice + job.row * w.row, w.start + job.other * w.slice + job.partner * w.row,
          job.stride * w.row};
}
static Rows rows_of(const Map &m, const Job &job, const Weights &w, const bfloat16 *copy) {
  if (lies_right(m, job, w)) return where_they_lie(job, w);
  return {copy, copy + LANES * copied(m), copied(m)};
}
static void lay_out(const Map &m, const Job &job, const Weights &w, bfloat16 *copy) {
  if (lies_right(m, job, w)) return;
  Rows rows = where_they_lie(job, w);
  if (job.count < LANES || deep(m.summed) > m.summed) memset(copy, 0, 2 * LANES * copied(m) * sizeof(bfloat16));
  for (int64_t i = 0; i < job.count; i++, copy += copied(m)) {
    memcpy(copy, rows.first + i * rows.apart, m.summed * sizeof(bfloat16));
    memcpy(copy + LANES * copied(m), rows.second + i * rows.apart, m.summed * sizeof(bfloat16));
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
