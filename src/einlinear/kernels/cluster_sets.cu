// A whole layer of BTT experts in one launch: input read once, result written once. Cut as by cluster.cuh, for tokens
// that are sorted by their set of experts (sets.py): the experts of a set are one layer of `ACTIVE` times the rank,
// whose factors a cluster loads again where its next tokens have another set. Weights of tokens go on the state, in
// float32.
//
// Besides what cluster.cuh names the host defines EXPERTS, PIECE (slots that lie together in a state) and whether it is
// KEPT.

static_assert(TOKENS == 32 && PIECE % 8 == 0, "a thread has eight tokens, in one piece of the state");

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(WARPS * 32, 1) void layer(const u16* x, const u16* first, const u16* second, const u16* bias,
                                                u16* y, u16* z, const int* rooms, const int* token_of,
                                                const int* tile_set, const int* tiles_at, const float* gates, int most,
                                                int x_token) {
  const int warp = thread() / 32, lane = thread() % 32, row = lane / 4, q = lane % 4;
  const u32 rank = cluster_rank(), cluster = cluster_index(), clusters = cluster_count();
  // Of each tile of the state: whether it is there, and whether it was read.
  const u32 whole = shared_memory(), read = whole + 8 * STATES;
  const u32 inputs = whole + 128 + warp * STAGES * INPUT, states = whole + 128 + WARPS * STAGES * INPUT;
  // The tokens of a tile have the same experts, and the tiles of a cluster follow each other.
  const int tiles = rooms[EXPERTS + 1], begin = (long long)tiles * cluster / clusters;
  const int mine = (int)((long long)tiles * (cluster + 1) / clusters) - begin;
  auto tile = [&](int i) { return begin + min(i, mine - 1); };

  // Every warp fetches its own input: where its tokens lie was asked for a tile earlier, and where that stands another
  // one.
  const int slice = warp * MT / RT;
  const u16* source = x + (rank * GS + slice) * A;
  constexpr int COPIES = INPUT / 16 / 32;
  int tokens_at[COPIES], packed_ahead;
  auto find = [&](int i, int packed) {
    if (i < mine) {
#pragma unroll
      for (int n = 0; n < COPIES; n++) {
        const int token = token_at((n * 32 + lane) / (LINE / 16));
        tokens_at[n] =
            token_of[packed / 64 + (token < packed % 64 + 1 ? token : 0)];  // the rest of a tile is made and not stored
      }
    }
  };
  auto fetch = [&](int i) {
    if (i < mine) {
#pragma unroll
      for (int n = 0; n < COPIES; n++) {
        const int at = (n * 32 + lane) / (LINE / 16), chunk = (n * 32 + lane) % (LINE / 16);
        const u32 into = inputs + (i % STAGES) * INPUT + at * LINE + ((LINE % 128 ? chunk : chunk ^ (at & 1) * 4) * 16);
        copy_there(into, source + (size_t)tokens_at[n] * x_token + chunk * 8);
      }
    }
    copies_end();
  };
  auto fetch_next = [&](int i) {
    fetch(i);
    find(i + 1, packed_ahead);
    if (i + 2 < mine) packed_ahead = tiles_at[tile(i + 2)];
  };
  if (mine > 0) {
    find(0, tiles_at[tile(0)]);
    packed_ahead = tiles_at[tile(1)];
  }
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch_next(i);

  if (ROUNDED > SUMS)  // what is summed beyond the state counts as zeros
    for (int at = thread() * 16; at < STATES * STATE; at += WARPS * 32 * 16) store(states + at, make_uint4(0, 0, 0, 0));
  if (thread() == 0) {
    for (int i = 0; i < STATES; i++) initialise(whole + 8 * i, 1), initialise(read + 8 * i, WARPS * CLUSTER);
    barriers_are_there();
  }
  cluster_arrive();

  // The sums of a matmul come in any order that both operands share: here a thread's eight numbers of 32 follow each
  // other.
  u32 wa[MT][KT][2][4], wb[FW][P][ST][2][2];
  auto expert = [&](int set, int j) {  // in ascending order, the first the leading digit
#pragma unroll
    for (int i = ACTIVE - 1; i > 0; i--)
      if (i > j) set /= EXPERTS;
    return set % EXPERTS;
  };
  auto keep_first = [&](int set) {
#pragma unroll
    for (int u = 0; u < MT; u++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int of = (warp * MT + u) * 16 + h * 8 + row, at = of % ROWS;
        const u16* from =
            first + ((size_t)(expert(set, at / EACH) * G + rank * GS + of / ROWS) * EACH + at % EACH) * A + q * 8;
#pragma unroll
        for (int k = 0; k < KT; k++) {
          const uint4 v = *(const uint4*)(from + k * 32);
          wa[u][k][0][h] = v.x, wa[u][k][0][h + 2] = v.y, wa[u][k][1][h] = v.z, wa[u][k][1][h + 2] = v.w;
        }
      }
  };
  auto keep_second = [&](int set) {
#pragma unroll
    for (int w = 0; w < FW; w++)
#pragma unroll
      for (int j = 0; j < P; j++)
#pragma unroll
        for (int k = 0; k < ST; k++) {
          const int e = (warp * NW + w * P) * 8 + feature_at(row >> 1, j) + (row & 1), sum = k * 32 + q * 8;
          const uint4 v =
              sum < SUMS ? *(const uint4*)(second + ((size_t)expert(set, sum / OWN) * F * E + rank * FS * E + e) * OWN +
                                           sum % OWN)
                         : make_uint4(0, 0, 0, 0);
          wb[w][j][k][0][0] = v.x, wb[w][j][k][0][1] = v.y, wb[w][j][k][1][0] = v.z, wb[w][j][k][1][1] = v.w;
        }
  };
  // Of a tile: its set, its first slot at each expert, its tokens; and the weights of those that this thread makes.
  int set = 0, next_set = 0, set_before = 0, first_kept = -1, second_kept = -1;
  int slots[ACTIVE], next_slots[ACTIVE], slot_before = 0, count_before = 0;
  float weights[ACTIVE][2 * NT];
  auto look = [&](int i) {
    next_set = tile_set[tile(i)];
#pragma unroll
    for (int j = 0; j < ACTIVE; j++) next_slots[j] = tiles_at[j * most + tile(i)];
  };
  auto weigh = [&]() {
#pragma unroll
    for (int j = 0; j < ACTIVE; j++)
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const float2 v = *(const float2*)(gates + next_slots[j] / 64 + q * 2 * NT + 2 * n);
        weights[j][2 * n] = v.x, weights[j][2 * n + 1] = v.y;
      }
  };
  if (mine > 0) look(0);
  cluster_wait();

  for (int i = 0; i <= mine; i++) {
    int there_tokens[TOKENS / 16][2];
    if (i > 0) {
#pragma unroll
      for (int m = 0; m < TOKENS / 16; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int token = m * 16 + h * 8 + row;
          there_tokens[m][h] = token < count_before ? token_of[slot_before + token] : -1;
        }
    }
    if (i < mine) {
      set = next_set;
#pragma unroll
      for (int j = 0; j < ACTIVE; j++) slots[j] = next_slots[j];
      weigh();
      look(i + 1);
      if (set != first_kept) keep_first(first_kept = set);
      const u32 input = inputs + (i % STAGES) * INPUT, there = whole + 8 * (i % STATES),
                state = states + (i % STATES) * STATE;
      if (thread() == 0) expect(there, FS * SUMS * TOKENS * 2);
      copies_wait<STAGES - 1>();
      warp_sync();
      u32 xb[NT][KT][2][2];
#pragma unroll
      for (int u = 0; u < MT; u++) {
        const int m = (warp * MT + u) % RT, g = u / RT;
        if (u % RT == 0) {
          load_input(xb, input, g);
          if (u + RT >= MT) {
            warp_sync();
            fetch_next(i + STAGES);
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
          const int at = m * 16 + h * 8 + row, f = at % F, j = at / EACH,
                    sum = place(j * OWN + (rank * GS + slice + g) * R + at % EACH / F);
          const u32 into = of_rank(state + (f % FS) * SLICE + sum * (TOKENS * 2), f / FS),
                    barrier = of_rank(there, f / FS);
          if (KEPT) {
            int packed = slots[0];
#pragma unroll
            for (int other = 1; other < ACTIVE; other++)
              if (j == other) packed = slots[other];
            const int slot = packed / 64 + q * 8, count = packed % 64 + 1 - q * 8,
                      feature = (rank * GS + slice + g) * EACH + at % EACH;
            u32 own[NT];
            u16* to = z + ((size_t)(slot / PIECE) * (G * EACH) + feature) * PIECE + slot % PIECE;
#pragma unroll
            for (int n = 0; n < NT; n++) {
              own[n] = pack(2 * n < count ? made[n][2 * h] : 0.0f, 2 * n + 1 < count ? made[n][2 * h + 1] : 0.0f);
            }
            // A set's slots end at a multiple of 16; those of nobody hold zeros.
            if (q % 2 * 8 + count > 0) write(to, make_uint4(own[0], own[1], own[2], own[3]));
          }
          u32 v[NT];
#pragma unroll
          for (int n = 0; n < NT; n++) {
            float low = weights[0][2 * n], high = weights[0][2 * n + 1];
#pragma unroll
            for (int other = 1; other < ACTIVE; other++)
              if (j == other) low = weights[other][2 * n], high = weights[other][2 * n + 1];
            v[n] = pack(made[n][2 * h] * low, made[n][2 * h + 1] * high);
          }
          const int turn = (sum >> SHIFT) & (CHUNKS - 1);
          send(into + ((q ^ turn) * 16), make_uint4(v[0], v[1], v[2], v[3]), barrier);
        }
      }
    }
    if (i > 0) {
      const int at = (i - 1) % STATES;
      if (set_before != second_kept) keep_second(second_kept = set_before);
      const u32 state = states + at * STATE;
      wait(whole + 8 * at, ((i - 1) / STATES) & 1);
#pragma unroll
      for (int w = 0; w < FW; w++) {
        const int part = warp * NW + w * P, f = part / ET, e = rank * FS * E + part * 8;
#pragma unroll
        for (int m = 0; m < TOKENS / 16; m++) {
          float made[P][4];
          multiply_state(made, wb[w], state + f * SLICE, m);
          if (BIAS) add_bias(made, bias + e);
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int token = there_tokens[m][h];
            if (token >= 0) store_result(y + (size_t)token * (F * E) + e, made, h);
          }
        }
      }
      warp_sync();
      if (lane < CLUSTER) arrive(of_rank(read + 8 * at, lane));
    }
    set_before = set, slot_before = slots[0] / 64, count_before = slots[0] % 64 + 1;
  }
  cluster_arrive();
  cluster_wait();
}
