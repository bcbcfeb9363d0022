// What hopper.cuh has, on a CPU: every thread of a cluster is a fiber, and fibers take turns.
//
// It is slow, and it is strict: copies arrive at once or only when they are waited for (`late`), fibers run ahead until
// they must wait, some blocks and warps far ahead of others, and memory that nobody wrote holds NaNs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
using std::min;
#define INSTRUCTION inline
#define __global__
#define __device__
#define __forceinline__ inline
#define __cluster_dims__(...)
#define __launch_bounds__(...)

struct Barrier { int count, pending, bytes; u32 phase; };
struct Warp { int arrived, turn; u32 in[32][10], out[32][4]; };
struct Block { std::vector<unsigned char> memory; std::map<u32, Barrier> barriers; Warp warps[WARPS]; int running; };
struct Copy { u32 to; const void* from; };
struct Fiber { ucontext_t at; int rank, thread; bool done; std::vector<std::vector<Copy>> copies; std::vector<Copy> open; bool waits; int turn; };

static std::vector<Block> blocks;
static std::vector<Fiber> fibers;
static Fiber* now;
static ucontext_t scheduler;
static int index_, count_, arrived, turn;
static bool late, moved;

static void yield() { swapcontext(&now->at, &scheduler); }
static void until(const std::function<bool()>& met) {
  while (!met()) yield();
  moved = true;
}
static Block& block() { return blocks[now->rank]; }
static unsigned char* place_of(u32 address) {
  if ((address & 0xfffff) + 16 > blocks[0].memory.size() || !blocks[address >> 20].running) abort();
  return &blocks[address >> 20].memory[address & 0xfffff];
}

u32 thread() { return now->thread; }
u32 cluster_rank() { return now->rank; }
u32 cluster_index() { return index_; }
u32 cluster_count() { return count_; }
u32 shared_memory() { return now->rank << 20; }
u32 of_rank(u32 address, u32 rank) { return (address & 0xfffff) | rank << 20; }

// All threads of a warp bring what they have; the last one to come does the work.
static void together(const std::function<void(Warp&)>& work) {
  Warp& warp = block().warps[now->thread / 32];
  const int mine = warp.turn;
  if (++warp.arrived == 32) work(warp), warp.arrived = 0, warp.turn++;
  else until([&] { return warp.turn != mine; });
}

void warp_sync() { together([](Warp&) {}); }

void cluster_arrive() {
  now->turn = turn;
  if (++arrived == (int)fibers.size()) arrived = 0, turn++;
}
void cluster_wait() { until([] { return turn != now->turn; }); }

template <class T> void write(u16* to, T v) {
  if ((uintptr_t)to % sizeof v) abort();
  memcpy(to, &v, sizeof v);
}
void store(u32 to, uint4 v) { memcpy(place_of(to), &v, 16); }
uint4 load(u32 from) { uint4 v; memcpy(&v, place_of(from), 16); return v; }

void load_turned(u32 (&a)[4], u32 from) {
  const int lane = now->thread % 32;
  block().warps[now->thread / 32].in[lane][0] = from;
  together([](Warp& warp) {
    for (int lane = 0; lane < 32; lane++)
      for (int m = 0; m < 4; m++) {
        u16 two[2];
        for (int i = 0; i < 2; i++) memcpy(&two[i], place_of(warp.in[m * 8 + lane % 4 * 2 + i][0]) + lane / 4 * 2, 2);
        warp.out[lane][m] = two[0] | (u32)two[1] << 16;
      }
  });
  memcpy(a, block().warps[now->thread / 32].out[lane], 16);
  warp_sync();
}

static void arrives(const Copy& copy) { memcpy(place_of(copy.to), copy.from, 16); }
void copy_there(u32 to, const void* from) {
  if ((uintptr_t)from % 16 || to % 16) abort();
  Copy copy{to, from};
  if (late) now->open.push_back(copy);
  else arrives(copy);
}
void copies_end() { now->copies.push_back(std::move(now->open)), now->open.clear(); }
template <int GROUPS> void copies_wait() {
  while ((int)now->copies.size() > GROUPS) {
    for (auto& copy : now->copies.front()) arrives(copy);
    now->copies.erase(now->copies.begin());
  }
}

static void turn_over(Barrier& b) { if (b.pending == 0 && b.bytes == 0) b.phase++, b.pending = b.count; }
static Barrier& barrier_at(u32 address) {
  if (!blocks[address >> 20].running) abort();  // its memory is another's by now
  return blocks[address >> 20].barriers.at(address & 0xfffff);
}
void initialise(u32 barrier, int count) { block().barriers[barrier & 0xfffff] = {count, count, 0, 0}; }
void barriers_are_there() {}
void arrive(u32 barrier) { auto& b = barrier_at(barrier); if (--b.pending < 0) abort(); turn_over(b); }
void expect(u32 barrier, int bytes) { barrier_at(barrier).bytes += bytes; arrive(barrier); }
void wait(u32 barrier, u32 parity) { until([=] { return (barrier_at(barrier).phase & 1) != parity; }); }

template <class T> void send(u32 to, T v, u32 barrier) {
  if (to >> 20 != barrier >> 20 || to % sizeof v) abort();
  memcpy(place_of(to), &v, sizeof v);
  auto& b = barrier_at(barrier);
  b.bytes -= sizeof v, turn_over(b);
}

static float number(u16 v) {
#if BFLOAT16
  u32 bits = (u32)v << 16;
  float made;
  memcpy(&made, &bits, 4);
  return made;
#else
  _Float16 made;
  memcpy(&made, &v, 2);
  return made;
#endif
}
static u16 rounded(float v) {
#if BFLOAT16
  u32 bits;
  memcpy(&bits, &v, 4);
  return std::isnan(v) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#else
  _Float16 half = v;
  u16 made;
  memcpy(&made, &half, 2);
  return made;
#endif
}
u32 pack(float low, float high) { return rounded(low) | (u32)rounded(high) << 16; }
float2 widened(u32 two) { return {number(two & 0xffff), number(two >> 16)}; }

void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const int lane = now->thread % 32;
  auto& in = block().warps[now->thread / 32].in[lane];
  memcpy(in, a, 16), memcpy(in + 4, b, 8), memcpy(in + 6, c, 16);
  together([](Warp& warp) {
    auto half = [&](int lane, int word, int i) { return number(warp.in[lane][word] >> 16 * i & 0xffff); };
    for (int lane = 0; lane < 32; lane++)
      for (int n = 0; n < 4; n++) {
        const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
        float start;
        memcpy(&start, &warp.in[lane][6 + n], 4);
        double sum = start;
        for (int k = 0; k < 16; k++)
          sum += (double)half(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) * half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        const float made = sum;
        memcpy(&warp.out[lane][n], &made, 4);
      }
  });
  memcpy(c, block().warps[now->thread / 32].out[lane], 16);
  warp_sync();
}

static std::function<void()> kernel;
static void begin() {
  kernel();
  now->done = true, block().running--;
  yield();
}

// Runs `work` on every thread of every cluster, one cluster after the other.
static void emulate(int clusters, int memory, bool copies_late, const std::function<void()>& work) {
  kernel = work, late = copies_late, count_ = clusters;
  const size_t STACK = 1 << 17;
  for (index_ = 0; index_ < clusters; index_++) {
    blocks.assign(CLUSTER, Block());
    for (auto& block : blocks) block.memory.assign(memory, 0xff), block.running = WARPS * 32;
    fibers.assign(CLUSTER * WARPS * 32, Fiber());
    std::vector<unsigned char> stacks(fibers.size() * STACK);
    arrived = 0, turn = 0;
    for (size_t n = 0; n < fibers.size(); n++) {
      Fiber& fiber = fibers[n];
      fiber.rank = n / (WARPS * 32), fiber.thread = n % (WARPS * 32);
      getcontext(&fiber.at);
      fiber.at.uc_stack.ss_sp = &stacks[n * STACK], fiber.at.uc_stack.ss_size = STACK, fiber.at.uc_link = &scheduler;
      makecontext(&fiber.at, begin, 0);
    }
    std::minstd_rand random(index_ + 1);
    int block = 0, warp = 0;
    for (bool busy = true; busy;) {
      busy = false;
      if (!moved || random() % 256 == 0) block = random() % (CLUSTER + 1), warp = random() % (2 * WARPS);  // one, or all of them
      moved = false;
      for (auto& fiber : fibers) {
        busy |= !fiber.done;
        const bool chosen = (block == CLUSTER || block == fiber.rank) && (warp >= WARPS || warp == fiber.thread / 32);
        if (chosen && !fiber.done) now = &fiber, swapcontext(&scheduler, &fiber.at);
      }
    }
  }
}
