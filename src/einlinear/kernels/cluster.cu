// A whole layer of two block-diagonal factors in one launch: input read once, result written once (cluster.cuh).

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(WARPS * 32, 1) void layer(const u16* x, const u16* first, const u16* second, const u16* bias,
                                                u16* y, int tokens, int x_token) {
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
    for (int at = thread() * 16; at < STATES * STATE; at += WARPS * 32 * 16) store(states + at, make_uint4(0, 0, 0, 0));
  if (thread() == 0) {
    for (int i = 0; i < STATES; i++) initialise(whole + 8 * i, 1), initialise(read + 8 * i, WARPS * CLUSTER);
    barriers_are_there();
  }
  cluster_arrive();

  // The sums of a matmul come in any order that both operands share: here a thread's eight numbers of 32 follow each
  // other.
  u32 wa[MT][KT][2][4], wb[FW][P][ST][2][2];
#pragma unroll
  for (int u = 0; u < MT; u++)
#pragma unroll
    for (int k = 0; k < KT; k++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint4 v = *(const uint4*)(first + (size_t)(rank * GS * ROWS + (warp * MT + u) * 16 + h * 8 + row) * A +
                                        k * 32 + q * 8);
        wa[u][k][0][h] = v.x, wa[u][k][0][h + 2] = v.y, wa[u][k][1][h] = v.z, wa[u][k][1][h + 2] = v.w;
      }
#pragma unroll
  for (int w = 0; w < FW; w++)
#pragma unroll
    for (int j = 0; j < P; j++)
#pragma unroll
      for (int k = 0; k < ST; k++) {
        const int e = (warp * NW + w * P) * 8 + feature_at(row >> 1, j) + (row & 1);
        const uint4 v = k * 32 + q * 8 < SUMS
                            ? *(const uint4*)(second + (size_t)(rank * FS * E + e) * SUMS + k * 32 + q * 8)
                            : make_uint4(0, 0, 0, 0);
        wb[w][j][k][0][0] = v.x, wb[w][j][k][0][1] = v.y, wb[w][j][k][1][0] = v.z, wb[w][j][k][1][1] = v.w;
      }
  cluster_wait();

  for (int i = 0; i <= mine; i++) {
    if (i < mine) {
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
          const u32 into = of_rank(state + (f % FS) * SLICE + sum * (TOKENS * 2), f / FS),
                    barrier = of_rank(there, f / FS);
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
          multiply_state(made, wb[w], state + f * SLICE, m);
          if (BIAS) add_bias(made, bias + e);
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int token = tile * TOKENS + m * 16 + h * 8 + row;
            if (token < tokens) store_result(y + (size_t)token * (F * E) + e, made, h);
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
