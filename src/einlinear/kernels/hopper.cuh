// Instructions of a GPU of compute capability 9.0 and later, by name. tests/kernels/emulated.h has them for a CPU.

typedef unsigned int u32;
typedef unsigned short u16;

#if BFLOAT16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif
#define INSTRUCTION __device__ __forceinline__

INSTRUCTION u32 thread() { return threadIdx.x; }

INSTRUCTION void warp_sync() { __syncwarp(); }

// The multiprocessor in its cluster, its cluster, and how many of them there are.
INSTRUCTION u32 cluster_rank() {
  u32 made;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(made));
  return made;
}

INSTRUCTION u32 cluster_index() {
  u32 made;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(made));
  return made;
}

INSTRUCTION u32 cluster_count() {
  u32 made;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(made));
  return made;
}

INSTRUCTION void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

INSTRUCTION void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Shared memory is addressed by numbers; `of_rank` is the same place in another multiprocessor of the cluster.
INSTRUCTION u32 shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return (u32)__cvta_generic_to_shared(memory);
}

INSTRUCTION u32 of_rank(u32 address, u32 rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

INSTRUCTION void store(u32 to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

INSTRUCTION uint4 load(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

// Four matrices of 8 x 8, turned; each thread names the address of one row.
INSTRUCTION void load_turned(u32 (&a)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from)
               : "memory");
}

// Into memory. Left to itself the compiler takes a vector apart where its registers do not follow each other.
INSTRUCTION void write(u16* to, u32 v) { asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(v) : "memory"); }

INSTRUCTION void write(u16* to, uint2 v) {
  asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

INSTRUCTION void write(u16* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// 16 bytes from memory; what was asked for until `copies_end` is one group.
INSTRUCTION void copy_there(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

INSTRUCTION void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until this thread waits for at most so many groups.
template <int GROUPS>
INSTRUCTION void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// A barrier turns over when `count` arrivals and all bytes that it expects are there.
INSTRUCTION void initialise(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

INSTRUCTION void barriers_are_there() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

INSTRUCTION void expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

INSTRUCTION void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

INSTRUCTION void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra.uni over; bra.uni again; over: }" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}

// Into the shared memory of another multiprocessor, whose barrier counts the bytes.
INSTRUCTION void send(u32 to, uint2 v, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(to), "r"(v.x),
               "r"(v.y), "r"(barrier)
               : "memory");
}

INSTRUCTION void send(u32 to, uint4 v, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
}

// Two float32 numbers rounded into one register, and back.
INSTRUCTION u32 pack(float low, float high) {
  u32 made;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
  return made;
}

INSTRUCTION float2 widened(u32 two) {
#if BFLOAT16
  return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
#else
  float2 made;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(made.x), "=f"(made.y)
      : "r"(two));
  return made;
#endif
}

// c += a b, of 16 x 16 and 16 x 8, by a warp.
INSTRUCTION void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
