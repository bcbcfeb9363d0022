// A whole layer of two block-diagonal factors in one launch: input read once, result written once.
//
// The multiprocessors of a cluster share the features of one layer. Each keeps its slices of both factors in
// registers, makes its part of the state of a tile of tokens, sends it into the shared memory of those that read it,
// and makes its part of the result. The letters of a BTT: first factor [g, (r f), a], second one [f, e, (g r)].
//
// What the machine does in one instruction is in hopper.cuh. The host defines G A R F E, CLUSTER, TOKENS (in a tile), STAGES (tiles of input on their way), STATES (tiles of the
// state in shared memory), WARPS, and whether there is a BIAS and numbers are BFLOAT16 (or float16).

constexpr int GS = G / CLUSTER, FS = F / CLUSTER;
constexpr int ROWS = R * F, SUMS = G * R, ROUNDED = (SUMS + 31) / 32 * 32;
constexpr int NT = TOKENS / 8;               // tiles of 8 tokens
constexpr int RT = ROWS / 16;                // tiles of 16 rows of a slice of the first factor
constexpr int MT = GS * RT / WARPS;          // those of one warp
constexpr int KT = A / 32;                   // sums of the first factor, 32 at a time
constexpr int ET = E / 8;                    // tiles of 8 features of a slice of the result
constexpr int NW = FS * ET / WARPS;          // those of one warp
constexpr int P = NW < ET ? NW : ET, FW = NW / P;
constexpr int PAIRS = P % 4 == 0 ? 4 : P % 2 == 0 ? 2 : 1;  // of features that a thread stores at a time
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

// The order in which a tile's tokens lie in shared memory: those that a thread holds follow each other in the state.
__device__ __forceinline__ int token_at(int row) { return ((row & 7) >> 1) * (2 * NT) + 2 * (row >> 3) + (row & 1); }

// The features that a thread has of P tiles of 8: what it stores at a time follows each other, and then what the next
// thread does, so that a store fills whole sectors.
__device__ __forceinline__ int feature_at(int q, int tile) { return tile / PAIRS * (8 * PAIRS) + q * (2 * PAIRS) + tile % PAIRS * 2; }

// Where the state's row of one sum lies: those that one instruction reads lie in different banks.
__device__ __forceinline__ int place(int sum) { return (sum & ~31) | ((sum & 7) << 2) | ((sum >> 3) & 3); }

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(WARPS * 32, 1)
void layer(const u16* x, const u16* first, const u16* second, const u16* bias, u16* y, int tokens, int x_token) {
  const int warp = thread() / 32, lane = thread() % 32, row = lane / 4, q = lane % 4;
  const u32 rank = cluster_rank(), cluster = cluster_index(), clusters = cluster_count();
  // Of each tile of the state: whether it is there, and whether it was read.
  const u32 whole = shared_memory(), read = whole + 8 * STATES;
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
        copy_there(into, source + (size_t)min(token, tokens - 1) * x_token + chunk * 8);
      }
    }
    copies_end();
  };
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch(i);

  if (ROUNDED > SUMS)  // what is summed beyond the state counts as zeros
    for (int at = thread() * 16; at < STATES * STATE; at += WARPS * 32 * 16)
      store(states + at, make_uint4(0, 0, 0, 0));
  if (thread() == 0) {
    for (int i = 0; i < STATES; i++) initialise(whole + 8 * i, 1), initialise(read + 8 * i, WARPS * CLUSTER);
    barriers_are_there();
  }
  cluster_arrive();

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
        const int e = (warp * NW + w * P) * 8 + feature_at(row >> 1, j) + (row & 1);
        const uint4 v = k * 32 + q * 8 < SUMS ? *(const uint4*)(second + (size_t)(rank * FS * E + e) * SUMS + k * 32 + q * 8)
                                              : make_uint4(0, 0, 0, 0);
        wb[w][j][k][0][0] = v.x, wb[w][j][k][0][1] = v.y, wb[w][j][k][1][0] = v.z, wb[w][j][k][1][1] = v.w;
      }
  cluster_wait();

  for (int i = 0; i <= mine; i++) {
    if (i < mine) {
      const u32 input = inputs + (i % STAGES) * INPUT, there = whole + 8 * (i % STATES), state = states + (i % STATES) * STATE;
      if (thread() == 0) expect(there, FS * SUMS * TOKENS * 2);
      copies_wait<STAGES - 1>();
      warp_sync();
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
            warp_sync();
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
          if constexpr (NT == 2) send(into + (((q >> 1) ^ turn) * 16) + (q & 1) * 8, make_uint2(v[0], v[1]), barrier);
          else send(into + ((q ^ turn) * 16), make_uint4(v[0], v[1], v[2], v[3]), barrier);
        }
      }
    }
    if (i > 0) {
      const int at = (i - 1) % STATES, tile = cluster + (i - 1) * clusters;
      const u32 state = states + at * STATE;
      wait(whole + 8 * at, ((i - 1) / STATES) & 1);
#pragma unroll
      for (int w = 0; w < FW; w++) {
        const int part = warp * NW + w * P, f = part / ET, e = rank * FS * E + part * 8;
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
              const float2 added = widened(*(const u32*)(bias + e + feature_at(q, j)));
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
              for (int j = 0; j < P; j += PAIRS)
                if constexpr (PAIRS == 4) write(to + feature_at(q, j), make_uint4(v[j], v[j + 1], v[j + 2], v[j + 3]));
                else if constexpr (PAIRS == 2) write(to + feature_at(q, j), make_uint2(v[j], v[j + 1]));
                else write(to + feature_at(q, j), v[j]);
            }
          }
        }
      }
      warp_sync();
      if (lane < CLUSTER) arrive(of_rank(read + 8 * at, lane));
    }
  }
  cluster_arrive();
  cluster_wait();
}
