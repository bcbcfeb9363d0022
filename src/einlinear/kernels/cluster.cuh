// What the kernels of layers over clusters share: how a layer of two block-diagonal factors is cut, and where what
// lies.
//
// The multiprocessors of a cluster share the features of one layer. Each keeps its slices of both factors in
// registers, makes its part of the state of a tile of tokens, sends it into the shared memory of those that read it,
// and makes its part of the result. The letters of a BTT: first factor [g, (r f), a], second one [f, e, (g r)]; ACTIVE
// experts are one layer of so many times the rank.
//
// What the machine does in one instruction is in hopper.cuh. The host defines G A R F E, CLUSTER, TOKENS (in a tile),
// STAGES (tiles of input on their way), STATES (tiles of the state in shared memory), WARPS, ACTIVE, and whether there
// is a BIAS and numbers are BFLOAT16 (or float16).

constexpr int GS = G / CLUSTER, FS = F / CLUSTER;
constexpr int EACH = R * F, ROWS = ACTIVE * EACH;  // rows of a slice of the first factor, of one expert and of all
constexpr int OWN = G * R, SUMS = ACTIVE * OWN, ROUNDED = (SUMS + 31) / 32 * 32;
constexpr int NT = TOKENS / 8;       // tiles of 8 tokens
constexpr int RT = ROWS / 16;        // tiles of 16 rows of a slice of the first factor
constexpr int MT = GS * RT / WARPS;  // those of one warp
constexpr int KT = A / 32;           // sums of the first factor, 32 at a time
constexpr int ET = E / 8;            // tiles of 8 features of a slice of the result
constexpr int NW = FS * ET / WARPS;  // those of one warp
constexpr int P = NW < ET ? NW : ET, FW = NW / P;
constexpr int PAIRS = P % 4 == 0 ? 4 : P % 2 == 0 ? 2 : 1;  // of features that a thread stores at a time
constexpr int ST = ROUNDED / 32;
constexpr int GW = MT > RT ? MT / RT : 1;  // slices of the input that a warp reads
constexpr int LINE = GW * A * 2;           // and their bytes, for one token
constexpr int INPUT = TOKENS * LINE;
constexpr int CHUNKS = TOKENS / 8;  // of 16 bytes, in a row of the state
constexpr int SHIFT = CHUNKS == 2 ? 2 : 1;
constexpr int SLICE = (ROUNDED + 1) * TOKENS * 2;  // bytes of the state that one f reads; a row more spreads the banks
constexpr int STATE = FS * SLICE;
static_assert(CHUNKS == 2 || CHUNKS == 4, "tiles have 16 or 32 tokens");
static_assert(G % CLUSTER == 0 && F % CLUSTER == 0 && A % 32 == 0 && ROWS % 16 == 0 && SUMS % 8 == 0 && E % 8 == 0, "");
static_assert(MT * WARPS == GS * RT && (MT % RT == 0 || RT % MT == 0), "a warp has rows of whole slices, or of one");
static_assert(NW * WARPS == FS * ET && FW * P == NW && ET % P == 0, "a warp has features of whole slices, or of one");

// The order in which a tile's tokens lie in shared memory: those that a thread holds follow each other in the state.
INSTRUCTION int token_at(int row) { return ((row & 7) >> 1) * (2 * NT) + 2 * (row >> 3) + (row & 1); }

// The features that a thread has of P tiles of 8: what it stores at a time follows each other, and then what the next
// thread does, so that a store fills whole sectors.
INSTRUCTION int feature_at(int q, int tile) { return tile / PAIRS * (8 * PAIRS) + q * (2 * PAIRS) + tile % PAIRS * 2; }

// Where the state's row of one sum lies: those that one instruction reads lie in different banks.
INSTRUCTION int place(int sum) { return (sum & ~31) | ((sum & 7) << 2) | ((sum >> 3) & 3); }

// A slice of a tile's input into registers: the operand of `mma`, eight tokens and sixteen sums at a time.
INSTRUCTION void load_input(u32 (&xb)[NT][KT][2][2], u32 input, int g) {
  const int lane = thread() % 32, row = lane / 4, q = lane % 4;
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int k = 0; k < KT; k++) {
      const int chunk = (g * A + k * 32) / 8 + q;
      const uint4 v = load(input + (j * 8 + row) * LINE + ((LINE % 128 ? chunk : chunk ^ (row & 1) * 4) * 16));
      xb[j][k][0][0] = v.x, xb[j][k][0][1] = v.y, xb[j][k][1][0] = v.z, xb[j][k][1][1] = v.w;
    }
}

// Sixteen tokens of the result, those from 16 m on, from the state that one f reads.
INSTRUCTION void multiply_state(float (&made)[P][4], const u32 (&wb)[P][ST][2][2], u32 state, int m) {
  const int lane = thread() % 32, of = lane % 8, chunk = m * 2 + (lane / 8) % 2;
#pragma unroll
  for (int j = 0; j < P; j++) made[j][0] = made[j][1] = made[j][2] = made[j][3] = 0.0f;
#pragma unroll
  for (int k = 0; k < 2 * ST; k++) {
    const int sum = place((k / 2) * 32 + (of >> 1) * 8 + (k % 2) * 4 + (lane / 16) * 2 + (of & 1));
    u32 za[4];
    load_turned(za, state + sum * (TOKENS * 2) + ((chunk ^ ((sum >> SHIFT) & (CHUNKS - 1))) * 16));
#pragma unroll
    for (int j = 0; j < P; j++) mma(made[j], za, wb[j][k / 2][k % 2]);
  }
}

INSTRUCTION void add_bias(float (&made)[P][4], const u16* bias) {
#pragma unroll
  for (int j = 0; j < P; j++) {
    const float2 added = widened(*(const u32*)(bias + feature_at(thread() % 4, j)));
    made[j][0] += added.x, made[j][1] += added.y, made[j][2] += added.x, made[j][3] += added.y;
  }
}

// One of the two tokens that a thread has.
INSTRUCTION void store_result(u16* to, const float (&made)[P][4], int h) {
  u32 v[P];
#pragma unroll
  for (int j = 0; j < P; j++) v[j] = pack(made[j][2 * h], made[j][2 * h + 1]);
#pragma unroll
  for (int j = 0; j < P; j += PAIRS) {
    u16* there = to + feature_at(thread() % 4, j);
    if constexpr (PAIRS == 4) write(there, make_uint4(v[j], v[j + 1], v[j + 2], v[j + 3]));
    else if constexpr (PAIRS == 2) write(there, make_uint2(v[j], v[j + 1]));
    else write(there, v[j]);
  }
}
