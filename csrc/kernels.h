// The whole C++ API of qops on one page: what crosses from the binding to the kernels.
// Plain structs of pointers, sizes and strides. Strides count elements; names ending in _bytes count bytes.
#pragma once

#include <cstdint>

// For functions in headers that several ISA levels include: an out-of-line copy would be shared by all of them and run
// with the instructions of whichever level the linker kept.
#ifdef __CUDACC__
#define QOPS_ALWAYS_INLINE __host__ __device__ __forceinline__
#else
#define QOPS_ALWAYS_INLINE inline __attribute__((always_inline))
#endif

struct CUstream_st;  // cudaStream_t points to it

namespace qops {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt32 };

// Rows of w in one strip of a packed weight.
inline constexpr int kStripRows = 16;

enum class Status : int32_t {
  kOk,
  kUnsupported,  // no kernel for this combination; the binding should have refused it
  kOutOfMemory,
  kIndexOutOfRange,  // a position, perm or id lies outside its table; nothing was written
  kLaunchFailed,     // CUDA refused the launch
};

// Rows of a tensor [..., H]: its leading dimensions, merged where their strides allow it. The row r = (i0, i1, ...)
// starts at element i0 * stride[0] + i1 * stride[1] + ...
struct Rows {
  static constexpr int kMaxDims = 4;
  int64_t count = 1;
  int dims = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  QOPS_ALWAYS_INLINE int64_t offset(int64_t row) const {
    if (dims == 1) return row * stride[0];
    int64_t offset = 0;
    for (int d = dims - 1; d >= 0; --d) {
      offset += row % size[d] * stride[d];
      row /= size[d];
    }
    return offset;
  }
};

QOPS_ALWAYS_INLINE Rows dense_rows(int64_t rows, int64_t columns) { return Rows{rows, 1, {rows}, {columns}}; }

// Somebody who asks a kernel what it is about to do: it tells them, one fact at a time, and does nothing else. Where
// `text` is null the fact is a number.
struct PlanListener {
  void (*hear)(PlanListener* self, const char* name, const char* text, int64_t number);

  QOPS_ALWAYS_INLINE void tell(const char* name, int64_t number) { hear(this, name, nullptr, number); }
  QOPS_ALWAYS_INLINE void tell(const char* name, const char* text) { hear(this, name, text, 0); }
};

// Threads that all run while the body of ThreadPool::run_team() does, so that they may wait for each other. Who of them
// does what must not show in the results.
struct Team {
  int rank;
  int size;
  void* meeting;
  void (*meet)(void* meeting);

  // Returns when all have called it; what they wrote before is there for all.
  QOPS_ALWAYS_INLINE void wait() const {
    if (size > 1) meet(meeting);
  }
};

// The caller's thread pool. run() calls body(arg, begin, end) over disjoint ranges that cover [0, n), each of at least
// `grain` items where n allows, and returns when all are done. run_team() calls body(arg, team) in each of the 1 to
// `most` threads that came. The body must not throw.
struct ThreadPool {
  using Body = void (*)(void* arg, int64_t begin, int64_t end);
  using TeamBody = void (*)(void* arg, const Team& team);
  void (*run)(int64_t n, int64_t grain, Body body, void* arg);
  void (*run_team)(int most, TeamBody body, void* arg);
  int threads;
  PlanListener* listener;  // null: the kernel works

  QOPS_ALWAYS_INLINE bool is_one(int64_t n, int64_t grain) const { return threads == 1 || n <= grain; }
};

// What parallel_for() would do. The number of threads is an upper bound.
QOPS_ALWAYS_INLINE void tell_tasks(const ThreadPool& pool, int64_t n, int64_t grain) {
  pool.listener->tell("tasks", n);
  pool.listener->tell("grain", grain);
  pool.listener->tell("threads", pool.is_one(n, grain) ? 1 : pool.threads);
}

template <class F>
QOPS_ALWAYS_INLINE void parallel_for(const ThreadPool& pool, int64_t n, int64_t grain, const F& f) {
  if (pool.listener != nullptr) [[unlikely]]
    return tell_tasks(pool, n, grain);
  if (pool.is_one(n, grain)) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  pool.run(
      n, grain, [](void* arg, int64_t begin, int64_t end) { (*static_cast<const F*>(arg))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f(team) in each thread of a team of at most `most`.
template <class F>
QOPS_ALWAYS_INLINE void with_team(const ThreadPool& pool, int most, const F& f) {
  if (most <= 1 || pool.threads <= 1) return f(Team{0, 1, nullptr, nullptr});
  pool.run_team(
      most < pool.threads ? most : pool.threads,
      [](void* arg, const Team& team) { (*static_cast<const F*>(arg))(team); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// q[k] of a row is near x[k] / scale. The rules in full: quantize_int8's docstring.
enum class QuantizeRule : int32_t { k127, kCompressedTensors, kTorchao };

// Where quantised rows go.
struct Int8Output {
  int8_t* q;     // contiguous [rows, K]
  float* scale;  // contiguous [rows]
  QuantizeRule rule;
};

struct QuantizeInt8Params {
  const void* x;
  Rows x_rows;
  DType dtype;
  int64_t k;
  Int8Output out;
};

// q - zero_point is near x / scale.
struct QuantizeInt8AsymParams {
  const void* x;
  Rows x_rows;
  DType dtype;
  int64_t k;
  bool divides;         // rule "compressed-tensors": x / scale, and every step is rounded to dtype
  int8_t* q;            // contiguous [rows, K]
  float* scale;         // contiguous [rows]
  int32_t* zero_point;  // contiguous [rows], -128 .. 127
};

// One scale and zero point for the whole tensor.
struct QuantizeInt8StaticParams {
  const void* x;
  Rows x_rows;
  DType dtype;
  int64_t k;
  const float* scale;         // positive and finite
  const int32_t* zero_point;  // -128 .. 127; null: 0
  bool divides;               // as above
  int8_t* q;                  // contiguous [rows, K]
};

struct RmsNormStyle {
  float eps;
  float weight_offset;
  bool round_before_weight;  // rounding="hf": R(R(z * rstd) * w); else R(z * rstd * (w + offset))
};

// y = rms_norm(z) * weight with z = x, or z = R(x + residual), which is then stored to residual_out.
struct RmsNormParams {
  const void* x;
  Rows x_rows;
  const void* residual;  // null: plain rms_norm
  Rows residual_rows;
  void* y;             // contiguous [rows, H]
  void* residual_out;  // contiguous [rows, H]; null when residual is
  const void* weight;  // [H], stride 1
  DType dtype;         // of x, residual, y and residual_out
  DType weight_dtype;
  int64_t h;
  RmsNormStyle style;
};

// quantize_int8 of what rms_norm would write; norm.y is null.
struct RmsNormInt8Params {
  RmsNormParams norm;
  Int8Output out;
};

// Canonical integer weights [N, K] <-> packed strips of 16 rows (layouts: csrc/cpu/weight_pack.cpp; on a GPU
// csrc/int4_layout.h and csrc/int8_layout.h).
struct WeightPackParams {
  const void* source;
  void* target;
  int64_t n;
  int64_t k;
};

// Scales and offsets of two levels: s = d c. Of each strip and kSuperColumns columns
// [2 + kSuperColumns / group_size, 16] bytes: the float16 d of its 16 rows, then for each group their int8 c.
inline constexpr int64_t kSuperColumns = 256;

// How a weight is made from its code q: see the op's docstring.
enum class WeightKind : int32_t {
  kSymmetric = 0,  // s (q - 8)
  kZeroPoint = 1,  // s (q - z), z a uint8 in 0 .. 16
  kFloatZero = 2,  // s (q - zf)
  kOffset = 3,     // s q + o
};

QOPS_ALWAYS_INLINE constexpr bool has_float_zeros(WeightKind kind) {
  return kind == WeightKind::kFloatZero || kind == WeightKind::kOffset;
}

// The weight of gate and up [N = 2 I, K] is I rows of gate above I rows of up. Packed for kSiluMul it is mixed: rows
// 0 .. 7 of a strip are gate, 8 .. 15 the same rows of up. (In a fragment of mma.m16n8k16 both then lie in one lane,
// whatever the tile.) This is the canonical row of a packed one. What silu_mul reads is never mixed.
QOPS_ALWAYS_INLINE constexpr int64_t unmixed_row(int64_t packed_row, int64_t n) {
  return packed_row / kStripRows * 8 + packed_row % 8 + (packed_row % kStripRows < 8 ? 0 : n / 2);
}
static_assert(unmixed_row(7, 48) == 7 && unmixed_row(8, 48) == 24 && unmixed_row(17, 48) == 9);

// The inverse.
QOPS_ALWAYS_INLINE constexpr int64_t mixed_row(int64_t row, int64_t n) {
  return row % (n / 2) / 8 * kStripRows + row % 8 + (row < n / 2 ? 0 : 8);
}
static_assert(mixed_row(7, 48) == 7 && mixed_row(24, 48) == 8 && mixed_row(9, 48) == 17 && mixed_row(47, 48) == 47);

// What becomes of t = R(x @ w.T + bias).
enum class Epilogue : int32_t {
  kNone,     // y = t, or R(t + residual)
  kSiluMul,  // y = silu_mul(gate, up), rounding="hf", of a mixed weight; no residual
  kInt8,     // y = quantize_int8_static of t; no residual
};

struct EpilogueParams {
  Epilogue epilogue;
  const void* residual;  // [rows, N] in the dtype of t, or null; may be y
  Rows residual_rows;
  const float* out_scale;         // of kInt8: positive and finite
  const int32_t* out_zero_point;  // of kInt8: -128 .. 127; null: 0

  QOPS_ALWAYS_INLINE bool is_plain() const { return epilogue == Epilogue::kNone && residual == nullptr; }
};

// sums = x @ w.T in float32, of x [M, K] of 16-bit `dtype`, rows `x_stride` apart, and contiguous w [N, K] of the same:
// the library's product that whoever calls the kernels has at hand.
struct DenseProduct {
  using Run = void (*)(void* context, DType dtype, const void* x, int64_t x_stride, const void* w, float* sums,
                       int64_t m, int64_t n, int64_t k);
  Run run;
  void* context;
};

// y = x @ w.T + bias over packed integer weights with one scale per row and group of group_size columns.
// Strips of 16 rows: packed [S, ...], scales and zeros [S, K / group_size, 16].
struct WeightOnlyGemmParams : EpilogueParams {  // of int4_gemm alone
  const void* x;
  Rows x_rows;
  const int32_t* perm;  // [K] or null: column j of the packed weight multiplies x[perm[j]]
  const void* packed;
  const void* scales;
  const void* zeros;  // uint8 for kZeroPoint, zero_dtype for kFloatZero and kOffset (with 8 bits the one), else null
  const void* bias;   // [N] or null; of a mixed weight in canonical order
  void* y;            // contiguous [rows, N], or [rows, N / 2] for kSiluMul
  DType dtype;        // of x, residual and y (but int8 for kInt8)
  DType scale_dtype;
  DType zero_dtype;     // of zeros that are floats; on a GPU kFloat32
  int32_t super_shift;  // of scales and offsets of two levels, on a CPU: 1 << super_shift groups share a d; 0: of one
  DType bias_dtype;
  WeightKind kind;
  int64_t n;
  int64_t k;
  int64_t group_size;
  int64_t* bad_index;    // set to the value of perm when the result is kIndexOutOfRange
  bool batch_invariant;  // on a GPU: whether a row's bits must not depend on M
  DenseProduct product;  // on a GPU
  void* scratch;         // of <op>_scratch_bytes() bytes on a GPU
};

// int4_gemm of rows of int8: x is int8 with a scale a row, `dtype` that of residual and y; or x is of `dtype` as well,
// and a CPU quantises it first, as quantize_int8 does.
struct Int4Int8GemmParams : WeightOnlyGemmParams {
  const float* x_scale;  // null where x is quantised first
  Rows x_scale_rows;     // strides of 0: one scale for all rows
  QuantizeRule rule;     // of that
};

// The weights of an int4 GEMM as numbers, columns in the order in which they are stored.
struct Int4DequantizeParams {
  const void* packed;
  const void* scales;
  const void* zeros;  // as in WeightOnlyGemmParams
  void* w;            // contiguous [N, K]
  DType dtype;        // of w
  DType scale_dtype;
  DType zero_dtype;
  int32_t super_shift;
  WeightKind kind;
  bool is_mixed;  // see unmixed_row(); w is canonical
  int64_t n;
  int64_t k;
  int64_t group_size;
};

// Rows of an 8-bit weight as numbers, columns in the order in which they are stored.
struct Int8EmbeddingParams {
  const void* ids;     // [tokens]
  bool ids_are_int64;  // else int32
  int64_t tokens;
  const void* packed;
  const void* scales;
  const void* zeros;  // of kOffset, else null
  void* y;            // contiguous [tokens, K]
  DType dtype;        // of y
  DType scale_dtype;
  DType zero_dtype;
  int32_t super_shift;  // as in WeightOnlyGemmParams
  WeightKind kind;      // kSymmetric, here s q, or kOffset
  bool is_mixed;        // see mixed_row(); ids are of canonical rows
  int64_t n;
  int64_t k;
  int64_t group_size;
  int64_t* bad_id;  // set when the result is kIndexOutOfRange
};

// y = R(fmaf(s_x, (q - zero_point) @ w.T * s_w, bias)), or the integer product itself where dtype is kInt32, which has
// no epilogue.
struct Int8GemmParams : EpilogueParams {
  const void* q;
  Rows q_rows;
  const float* scale;         // s_x
  Rows scale_rows;            // strides of 0: one scale for all rows
  const int32_t* zero_point;  // null: 0
  Rows zero_point_rows;
  const void* packed;   // strips: csrc/cpu/weight_pack.cpp, on a GPU csrc/int8_layout.h
  const void* w_scale;  // s_w, [S, 16]
  const void* bias;     // [N] or null; of a mixed weight in canonical order
  void* y;              // contiguous [rows, N], or [rows, N / 2] for kSiluMul
  DType dtype;          // of residual and y (but int8 for kInt8)
  DType w_scale_dtype;
  DType bias_dtype;
  int64_t n;
  int64_t k;
  void* scratch;  // of int8_gemm_scratch_bytes() bytes on a GPU
};

// A tensor x [..., T, heads, D] of any strides and where its rotated values go: y may be x, with the same strides.
struct RotaryHeads {
  const void* x;
  Rows x_tokens;
  int64_t x_head_stride;
  int64_t x_stride;  // of the last dimension
  void* y;
  Rows y_tokens;
  int64_t y_head_stride;
  int64_t y_stride;
  int64_t heads;
};

// Rotates the first R = 2 * pairs elements of every head of q and k by the angles of its token's position.
struct RotaryParams {
  RotaryHeads q, k;  // of the same tokens
  const void* cos;   // [table_rows, pairs]
  const void* sin;
  int64_t cos_row_stride, cos_stride;
  int64_t sin_row_stride, sin_stride;
  int64_t table_rows;
  const void* positions;  // of every token; null: token t of each sequence is at position t
  Rows position_rows;
  bool positions_are_int64;  // else int32
  DType dtype;               // of q and k
  DType table_dtype;
  int64_t t;  // tokens of a sequence
  int64_t d;
  int64_t pairs;
  bool interleaved;       // pairs (2i, 2i + 1); else (i, i + R / 2)
  int64_t* bad_position;  // set when the result is kIndexOutOfRange
};

// rotary of what rms_norm would write for every head of q and k.
struct QkNormRotaryParams {
  RotaryParams rotary;
  const void* q_weight;  // [D], stride 1
  const void* k_weight;
  DType q_weight_dtype;
  DType k_weight_dtype;
  RmsNormStyle style;
};

// y = softmax(scale * q k^T) v of the T newest tokens of each sequence, which are the last T of S rows. The last
// dimension of each tensor is dense.
struct DecodeAttentionParams {
  const void* q;  // [B, T, Hq, D]
  int64_t q_strides[3];
  const void* k;  // [B, Hkv, S, D]; Hq is a multiple of Hkv
  int64_t k_strides[3];
  const void* v;
  int64_t v_strides[3];
  const bool* mask;  // [B, T, S] or null: causal
  int64_t mask_strides[3];
  void* y;      // contiguous [B, T, Hq, D]
  DType dtype;  // of q, k, v and y
  int64_t batch;
  int64_t t;  // at most kMaxDecodeTokens
  int64_t q_heads;
  int64_t kv_heads;
  int64_t s;
  int64_t d;
  float scale;
  float softcap;           // 0: none
  int64_t window;          // 0: none; without a mask
  int64_t first_position;  // of row 0 of k and v
};
inline constexpr int kMaxDecodeTokens = 8;

// What a linear inside of a block of operators multiplies: rows of floats, or what quantize_int8 and, with zero points,
// quantize_int8_asym make of them by these rules.
enum class BlockInput : int32_t { kFloat, k127, kCompressedTensors, kTorchao, k255, kCompressedTensorsAsym };

QOPS_ALWAYS_INLINE constexpr bool has_zero_points(BlockInput input) { return input >= BlockInput::k255; }

// A linear inside of a block of operators: x, y and residual are the block's. By the weight and the input it is
// int4_gemm, int8_weight_only_gemm, int4_int8_gemm or int8_gemm (whose weight has one group and no zeros).
struct BlockLinear {
  bool has_8_bits;
  BlockInput input;  // of a weight of 4 bits without zero points
  WeightOnlyGemmParams product;
};

// y = x + down(silu_mul(gate_up(rms_norm(x)))), or x + rms_norm(down(...)).
struct MlpBlockParams {
  RmsNormParams norm;   // of x; y is null
  BlockLinear gate_up;  // with the epilogue kSiluMul a mixed weight
  BlockLinear down;
  RmsNormParams post_norm;  // of what down gives; null weight: none
  void* y;                  // contiguous [rows, H]
};

// y = x + o(decode_attention(rotary(rms_norm(q)), rotary(rms_norm(k)), v)), q, k, v = qkv(rms_norm(x)), or x + rms_norm
// of what o gives. The norms of q and k have the style of that of x.
struct AttentionBlockParams {
  RmsNormParams norm;  // of x [B * T, H]; y is null
  BlockLinear qkv;
  const void* q_norm;  // [D], stride 1; null: none
  const void* k_norm;
  DType q_norm_dtype;
  DType k_norm_dtype;
  RotaryParams rotary;              // tables and positions of the tokens of q.x_tokens; pairs = 0: none
  DecodeAttentionParams attention;  // q and y are null
  void* keys;                       // attention.k and attention.v, whose last T rows are written
  void* values;
  BlockLinear o;
  RmsNormParams post_norm;
  void* y;  // contiguous [rows, H]
};

// Layers one after another, each on what the one before has given: the halves of layer i in order, `x` of the one being
// `y` of the other.
struct DecoderLayersParams {
  int64_t layers;
  const AttentionBlockParams* attention;
  const MlpBlockParams* mlp;
};

// y = R(R(silu(gate)) * up) or R(silu(gate) * up).
struct SiluMulParams {
  const void* gate;
  Rows gate_rows;
  const void* up;
  Rows up_rows;
  void* y;      // contiguous [rows, I]
  DType dtype;  // of gate, up and y
  int64_t columns;
  bool round_before_up;  // rounding="hf"
};

// quantize_int8 of what silu_mul would write; gated.y is null.
struct SiluMulInt8Params {
  SiluMulParams gated;
  Int8Output out;
};

// Every kernel, with its parameters and where it runs. On a CPU each is
// `Status name(const Params&, const ThreadPool&)`, compiled once per ISA level; cpu::name() calls the one chosen at
// load. On a GPU it is `Status name(const Params&, const Queue&)`.
#define QOPS_FOR_EACH_KERNEL(ANYWHERE, ON_CPU)             \
  ON_CPU(attention_block, AttentionBlockParams)            \
  ON_CPU(decode_attention, DecodeAttentionParams)          \
  ON_CPU(decoder_layers, DecoderLayersParams)              \
  ANYWHERE(int4_dequantize, Int4DequantizeParams)          \
  ANYWHERE(int4_gemm, WeightOnlyGemmParams)                \
  ANYWHERE(int4_int8_gemm, Int4Int8GemmParams)             \
  ANYWHERE(int4_pack, WeightPackParams)                    \
  ANYWHERE(int4_unpack, WeightPackParams)                  \
  ON_CPU(int8_embedding, Int8EmbeddingParams)              \
  ANYWHERE(int8_gemm, Int8GemmParams)                      \
  ANYWHERE(int8_pack, WeightPackParams)                    \
  ANYWHERE(int8_unpack, WeightPackParams)                  \
  ANYWHERE(int8_weight_only_gemm, WeightOnlyGemmParams)    \
  ON_CPU(mlp_block, MlpBlockParams)                        \
  ANYWHERE(qk_norm_rotary, QkNormRotaryParams)             \
  ANYWHERE(quantize_int8, QuantizeInt8Params)              \
  ANYWHERE(quantize_int8_asym, QuantizeInt8AsymParams)     \
  ANYWHERE(quantize_int8_static, QuantizeInt8StaticParams) \
  ANYWHERE(rms_norm, RmsNormParams)                        \
  ANYWHERE(rms_norm_int8, RmsNormInt8Params)               \
  ANYWHERE(rotary, RotaryParams)                           \
  ANYWHERE(silu_mul, SiluMulParams)                        \
  ANYWHERE(silu_mul_int8, SiluMulInt8Params)

#define QOPS_SKIP(name, Params)
#define QOPS_FOR_EACH_CPU_KERNEL(X) QOPS_FOR_EACH_KERNEL(X, X)
#define QOPS_FOR_EACH_CUDA_KERNEL(X) QOPS_FOR_EACH_KERNEL(X, QOPS_SKIP)

namespace cpu {

#define QOPS_DECLARE(name, Params) Status name(const Params& params, const ThreadPool& pool);
QOPS_FOR_EACH_CPU_KERNEL(QOPS_DECLARE)
#undef QOPS_DECLARE

// Name of the ISA level in use ("scalar", "avx2", "avx512", "amx"), and all that this build holds and this CPU can run.
const char* isa_level();
const char* isa_levels_available();
// Null, or what is wrong with the environment variable QOPS_ISA.
const char* isa_error();

}  // namespace cpu

namespace cuda {

// Where kernels are launched.
struct Queue {
  ::CUstream_st* stream;   // of the current GPU
  PlanListener* listener;  // null: they are launched
};

#define QOPS_DECLARE(name, Params) Status name(const Params& params, const Queue& queue);
QOPS_FOR_EACH_CUDA_KERNEL(QOPS_DECLARE)
#undef QOPS_DECLARE

// What they need of the current GPU's memory while they run.
int64_t int4_gemm_scratch_bytes(const WeightOnlyGemmParams& params);
int64_t int4_int8_gemm_scratch_bytes(const Int4Int8GemmParams& params);
int64_t int8_gemm_scratch_bytes(const Int8GemmParams& params);
int64_t int8_weight_only_gemm_scratch_bytes(const WeightOnlyGemmParams& params);

}  // namespace cuda
}  // namespace qops
