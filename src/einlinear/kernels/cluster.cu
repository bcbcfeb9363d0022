// A whole layer of two block-diagonal factors in one launch: input read once, result written once.
//
// The multiprocessors of a cluster share the features of one layer. Each keeps its slices of both factors in
// registers, makes its part of the state of a tile of tokens, sends it into the shared memory of those that read it,
// and makes its part of the result. The letters of a BTT: first factor [g, (r f), a], second one [f, e, (g r)].
//
// The host defines G A R F E, CLUSTER, TOKENS (in a tile), STAGES (tiles of input on their way), STATES (tiles of the
// state in shared memory), WARPS, and whether there is a BIAS and numbers are BFLOAT16 (or float16).

typedef unsigned int u32;
typedef unsigned short u16;

#if BFLOAT16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

constexpr int GS = G / CLUSTER, FS = F / CLUSTER;
constexpr int ROWS = R * F, SUMS = G * R, ROUNDED = (SUMS + 31) / 32 * 32;
constexpr int NT = TOKENS / 8;               // tiles of 8 tokens
constexpr int RT = ROWS / 16;                // tiles of 16 rows of a slice of the first factor
constexpr int MT = GS * RT / WARPS;          // those of one warp
constexpr int KT = A / 32;                   // sums of the first factor, 32 at a time
constexpr int ET = E / 8;                    // tiles of 8 features of a slice of the result
constexpr int NW = FS * ET / WARPS;          // those of one warp
constexpr int P = NW < ET ? NW : ET, FW = NW / P;
constexpr int ST = ROUNDED / 32;
constexpr int GW = MT > RT ? MT / RT : 1;    // slices of the input that a warp reads
constexpr int LINE = GW * A * 2;             // and their bytes, for one token
constexpr int INPUT = TOKENS * LINE;
constexpr int CHUNKS = TOKENS / 8;           // of 16 bytes, in a row of the state
constexpr int SHIFT = CHUNKS == 2 ? 2 : 1;
constexpr int SLICE = (ROUNDED + 1) * TOKENS * 2;  // bytes of the state that one f reads; a row more spreads the banks
constexpr int STATE = FS * SLICE;
static_assert(CHUNKS == 2 || CHUNKS == 4, "tiles have 16 or 32 tokens");
static_assert(G % CLUSTER == 0 && F % CLUSTER == 0 && A % 32 == 0 && ROWS % 16 == 0 && SUMS % 8 == 0 && E % 8 == 0, "");
static_assert(MT * WARPS == GS * RT && (MT % RT == 0 || RT % MT == 0), "a warp has rows of whole slices, or of one");
static_assert(NW * WARPS == FS * ET && FW * P == NW && ET % P == 0, "a warp has features of whole slices, or of one");

__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 made;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
  return made;
}

// The two numbers in a register.
__device__ __forceinline__ float2 widened(u32 two) {
#if BFLOAT16
  return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
#else
  float2 made;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }" : "=f"(made.x), "=f"(made.y) : "r"(two));
  return made;
#endif
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint4 load(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}

__device__ __forceinline__ void load_turned(u32 (&a)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void initialise(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra.uni over; bra.uni again; over: }"
               :: "r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ u32 of_rank(u32 address, u32 rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// The order in which a tile's tokens lie in shared memory: those that a thread holds follow each other in the state.
__device__ __forceinline__ int token_at(int row) { return ((row & 7) >> 1) * (2 * NT) + 2 * (row >> 3) + (row & 1); }

// Where the state's row of one sum lies: those that one instruction reads lie in different banks.
__device__ __forceinline__ int place(int sum) { return (sum & ~31) | ((sum & 7) << 2) | ((sum >> 3) & 3); }

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(WARPS * 32, 1)
void layer(const u16* x, const u16* first, const u16* second, const u16* bias, u16* y, int tokens, int x_token) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, q = lane % 4;
  u32 rank, cluster, clusters;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(cluster));
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(clusters));
  // Of each tile of the state: whether it is there, and whether it was read.
  const u32 whole = shared(memory), read = whole + 8 * STATES;
  const u32 inputs = whole + 128 + warp * STAGES * INPUT, states = whole + 128 + WARPS * STAGES * INPUT;
  const int tiles = (tokens + TOKENS - 1) / TOKENS, mine = cluster < tiles ? (tiles - 1 - cluster) / clusters + 1 : 0;

  // Every warp fetches its own input.
  const int slice = warp * MT / RT;
  const u16* source = x + (rank * GS + slice) * A;
  auto fetch = [&](int i) {
    if (i < mine) {
#pragma unroll
      for (int n = 0; n < INPUT / 16 / 32; n++) {
        const int at = (n * 32 + lane) / (LINE / 16), chunk = (n * 32 + lane) % (LINE / 16);
        const int token = (cluster + i * clusters) * TOKENS + token_at(at);
        const u32 into = inputs + (i % STAGES) * INPUT + at * LINE + ((LINE % 128 ? chunk : chunk ^ (at & 1) * 4) * 16);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(into), "l"(source + (size_t)min(token, tokens - 1) * x_token + chunk * 8), "r"(token < tokens ? 16 : 0) : "memory");
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch(i);

  if (ROUNDED > SUMS)  // what is summed beyond the state counts as zeros
    for (int at = threadIdx.x * 16; at < STATES * STATE; at += WARPS * 32 * 16)
      asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" :: "r"(states + at), "r"(0) : "memory");
  if (threadIdx.x == 0) {
    for (int i = 0; i < STATES; i++) initialise(whole + 8 * i, 1), initialise(read + 8 * i, WARPS * CLUSTER);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");

  // The sums of a matmul come in any order that both operands share: here a thread's eight numbers of 32 follow each other.
  u32 wa[MT][KT][2][4], wb[FW][P][ST][2][2];
#pragma unroll
  for (int u = 0; u < MT; u++)
#pragma unroll
    for (int k = 0; k < KT; k++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint4 v = *(const uint4*)(first + (size_t)(rank * GS * ROWS + (warp * MT + u) * 16 + h * 8 + row) * A + k * 32 + q * 8);
        wa[u][k][0][h] = v.x, wa[u][k][0][h + 2] = v.y, wa[u][k][1][h] = v.z, wa[u][k][1][h + 2] = v.w;
      }
#pragma unroll
  for (int w = 0; w < FW; w++)
#pragma unroll
    for (int j = 0; j < P; j++)
#pragma unroll
      for (int k = 0; k < ST; k++) {
        const int e = (warp * NW + w * P) * 8 + (row >> 1) * (2 * P) + 2 * j + (row & 1);
        const uint4 v = k * 32 + q * 8 < SUMS ? *(const uint4*)(second + (size_t)(rank * FS * E + e) * SUMS + k * 32 + q * 8)
                                              : make_uint4(0, 0, 0, 0);
        wb[w][j][k][0][0] = v.x, wb[w][j][k][0][1] = v.y, wb[w][j][k][1][0] = v.z, wb[w][j][k][1][1] = v.w;
      }
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");

  for (int i = 0; i <= mine; i++) {
    if (i < mine) {
      const u32 input = inputs + (i % STAGES) * INPUT, there = whole + 8 * (i % STATES), state = states + (i % STATES) * STATE;
      if (threadIdx.x == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(there), "r"(FS * SUMS * TOKENS * 2) : "memory");
      asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 1) : "memory");
      __syncwarp();
      u32 xb[NT][KT][2][2];
#pragma unroll
      for (int u = 0; u < MT; u++) {
        const int m = (warp * MT + u) % RT, g = u / RT;
        if (u % RT == 0) {
#pragma unroll
          for (int j = 0; j < NT; j++)
#pragma unroll
            for (int k = 0; k < KT; k++) {
              const int chunk = (g * A + k * 32) / 8 + q;
              const uint4 v = load(input + (j * 8 + row) * LINE + ((LINE % 128 ? chunk : chunk ^ (row & 1) * 4) * 16));
              xb[j][k][0][0] = v.x, xb[j][k][0][1] = v.y, xb[j][k][1][0] = v.z, xb[j][k][1][1] = v.w;
            }
          if (u + RT >= MT) {
            __syncwarp();
            fetch(i + STAGES);
          }
          if (u == 0 && i >= STATES) wait(read + 8 * (i % STATES), (i / STATES - 1) & 1);
        }
        float made[NT][4];
#pragma unroll
        for (int j = 0; j < NT; j++) made[j][0] = made[j][1] = made[j][2] = made[j][3] = 0.0f;
#pragma unroll
        for (int k = 0; k < 2 * KT; k++)
#pragma unroll
          for (int j = 0; j < NT; j++) mma(made[j], wa[u][k / 2][k % 2], xb[j][k / 2][k % 2]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int at = m * 16 + h * 8 + row, f = at % F, sum = place((rank * GS + slice + g) * R + at / F);
          const u32 into = of_rank(state + (f % FS) * SLICE + sum * (TOKENS * 2), f / FS), barrier = of_rank(there, f / FS);
          u32 v[NT];
#pragma unroll
          for (int j = 0; j < NT; j++) v[j] = pack(made[j][2 * h], made[j][2 * h + 1]);
          const int turn = (sum >> SHIFT) & (CHUNKS - 1);
          if constexpr (NT == 2)
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];"
                         :: "r"(into + (((q >> 1) ^ turn) * 16) + (q & 1) * 8), "r"(v[0]), "r"(v[1]), "r"(barrier) : "memory");
          else
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];"
                         :: "r"(into + ((q ^ turn) * 16)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(barrier) : "memory");
        }
      }
    }
    if (i > 0) {
      const int at = (i - 1) % STATES, tile = cluster + (i - 1) * clusters;
      const u32 state = states + at * STATE;
      wait(whole + 8 * at, ((i - 1) / STATES) & 1);
#pragma unroll
      for (int w = 0; w < FW; w++) {
        const int part = warp * NW + w * P, f = part / ET, e = rank * FS * E + part * 8 + q * (2 * P);
#pragma unroll
        for (int m = 0; m < TOKENS / 16; m++) {
          float made[P][4];
#pragma unroll
          for (int j = 0; j < P; j++) made[j][0] = made[j][1] = made[j][2] = made[j][3] = 0.0f;
#pragma unroll
          for (int k = 0; k < 2 * ST; k++) {
            const int of = lane % 8, sum = place((k / 2) * 32 + (of >> 1) * 8 + (k % 2) * 4 + (lane / 16) * 2 + (of & 1)), chunk = m * 2 + (lane / 8) % 2;
            u32 za[4];
            load_turned(za, state + f * SLICE + sum * (TOKENS * 2) + ((chunk ^ ((sum >> SHIFT) & (CHUNKS - 1))) * 16));
#pragma unroll
            for (int j = 0; j < P; j++) mma(made[j], za, wb[w][j][k / 2][k % 2]);
          }
          if (BIAS) {
#pragma unroll
            for (int j = 0; j < P; j++) {
              const float2 added = widened(*(const u32*)(bias + e + 2 * j));
              made[j][0] += added.x, made[j][1] += added.y, made[j][2] += added.x, made[j][3] += added.y;
            }
          }
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int token = tile * TOKENS + m * 16 + h * 8 + row;
            if (token < tokens) {
              u32 v[P];
#pragma unroll
              for (int j = 0; j < P; j++) v[j] = pack(made[j][2 * h], made[j][2 * h + 1]);
              u16* to = y + (size_t)token * (F * E) + e;
#pragma unroll
              for (int j = 0; j < P; j += P % 4 == 0 ? 4 : P % 2 == 0 ? 2 : 1)
                if constexpr (P % 4 == 0) *(uint4*)(to + 2 * j) = make_uint4(v[j], v[j + 1], v[j + 2], v[j + 3]);
                else if constexpr (P % 2 == 0) *(uint2*)(to + 2 * j) = make_uint2(v[j], v[j + 1]);
                else *(u32*)(to + 2 * j) = v[j];
            }
          }
        }
      }
      __syncwarp();
      if (lane < CLUSTER) asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(of_rank(read + 8 * at, lane)) : "memory");
    }
  }
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
