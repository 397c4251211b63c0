// qk_norm_rotary: rms_norm of every head of q and k over its D elements, then rotary.
//
// Idea: one pass, so that a head is read once and written once. Heads of at most 256 elements (heads_kernel) stay in
// registers: 8, 16 or 32 lanes have a head, a vector each, so a warp has two heads of 128. Two lanes whose vectors are
// partners exchange halves of what the norm has rounded, turn four pairs each, and exchange again, two shuffles each
// time. Longer heads, and those that are not aligned, wait normalised in shared memory for their partners
// (qk_norm_rotary_kernel, on the rows of row.cuh, which are the heads).
//
// Bytes and operations: the 512 bytes of a head of 128 in bf16 take 39 cycles of an H100's multiprocessor. heads_kernel
// has 118 instructions for it, which are 30 cycles (a warp for each head had 544): memory bounds it if 75 % of the
// issue slots are used, and at 62 % it would have to be 98. Of the 236 of a warp with two heads 137 compute: 24 turn
// pairs, 24 widen (x, halves, angles), 23 square and add, 24 make 1 / sqrt and look twice for values that are rare, 20
// scale and round, 16 exchange, and 6 load or store. The others make addresses and guards; 23 of them only read
// parameters, and 12 are for tables of the other type.
#include "cuda/norm_row.cuh"
#include "cuda/rotate_head.cuh"

namespace qops::cuda {
namespace {

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kBlock, 1)
    qk_norm_rotary_kernel(const __grid_constant__ QkNormRotaryParams params) {
  QOPS_SHARED(float, sums, Shape::kWarps);
  QOPS_DYNAMIC_SHARED(shared);
  const RotaryParams& p = params.rotary;
  const int64_t all_heads = p.q.heads + p.k.heads;
  const int64_t row = row_of_thread<Shape>();
  if (is_beyond<Shape>(row, p.q.x_tokens.count * all_heads)) return;
  const int64_t token = row / all_heads;
  const bool is_q = row % all_heads < p.q.heads;
  const int64_t head = row % all_heads - (is_q ? 0 : p.q.heads);
  const RotaryHeads& heads = is_q ? p.q : p.k;
  const void* weight = is_q ? params.q_weight : params.k_weight;
  const DType weight_dtype = is_q ? params.q_weight_dtype : params.k_weight_dtype;
  const T* x = static_cast<const T*>(heads.x) + heads.x_tokens.offset(token) + head * heads.x_head_stride;
  T* y = static_cast<T*>(heads.y) + heads.y_tokens.offset(token) + head * heads.y_head_stride;
  T* normed = reinterpret_cast<T*>(shared) + threadIdx.x / Shape::kThreads * ((p.d + kVector - 1) / kVector * kVector);

  const auto read = [&](int64_t at, int64_t n, Vector& v) {
    load_strided<Shape::kAligned>(x + at * heads.x_stride, heads.x_stride, n, v);
  };
  Held<Shape> held;
  Vector partials = {};
  for_chunks<Shape>(p.d, [&](int chunk, int64_t at, int64_t n) {
    read(at, n, held.vectors[chunk]);
    add_squares(held.vectors[chunk], partials);
  });
  const float rstd = rstd_of_row<Shape>(partials, p.d, params.style, sums);
  for_chunks<Shape>(p.d, [&](int chunk, int64_t at, int64_t n) {
    Vector v;
    Words<T> words;
    held.get(chunk, at, n, v, read);
    normalise<Shape::kAligned, T>(v, weight, weight_dtype, at, n, rstd, params.style, words);
    store_words<Shape::kAligned>(normed + at, n, words);
  });
  if constexpr (Shape::kThreads == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }

  const int64_t position = position_of(p, token);
  const int rotating = rotating_units(p), units = rotating + copying_units(p);
  for (int unit = thread_of_row<Shape>(); unit < units; unit += Shape::kThreads) {
    if (unit < rotating) {
      rotate_unit<Shape::kAligned>(p, position, unit, normed, 1, y, heads.y_stride);
    } else {
      copy_unit<Shape::kAligned>(p, unit - rotating, normed, 1, y, heads.y_stride);
    }
  }
}

// --- heads of at most 256 elements, aligned --------------------------------------------------------------------------

constexpr int kThreads = 128;

// Bytes from a token, a sequence or a head to the next: 32 bits, so that an address takes a multiplication for each.
struct Strides {
  int32_t token, sequence, head;
};

// The parameters as the kernel needs them.
struct HeadsPlan {
  struct Side {
    const void* x;
    void* y;
    const void* weight;
    Strides x_strides, y_strides;
    uint32_t heads, first_block;  // of a token
    DType weight_dtype;
    bool is_packed;  // the norm ends with products of elements of T
  } q, k;
  const void* cos;
  const void* sin;
  int32_t cos_stride, sin_stride;
  uint32_t table_rows;
  bool table_is_float32;  // else T
  bool positions_are_int64;
  const void* positions;
  Strides position_strides;
  uint32_t vectors, turning, half;  // of a head, of what turns of it, of half of that
  float d, inverse_d;               // exact, or 0
  RmsNormStyle style;
};

template <class E>
QOPS_DEVICE const E* at_byte(const void* p, int64_t byte) {
  return reinterpret_cast<const E*>(static_cast<const char*>(p) + byte);
}

// One instruction.
QOPS_DEVICE int64_t product(uint32_t count, int32_t stride) { return int64_t{static_cast<int32_t>(count)} * stride; }

// blockIdx.x is the token of a sequence, blockIdx.z the sequence.
QOPS_DEVICE int64_t offset_of(const Strides& strides, uint32_t head) {
  return product(blockIdx.x, strides.token) + product(blockIdx.z, strides.sequence) + product(head, strides.head);
}

// cos and sin of pairs first .. first + 3 of the block's token; NaN as load_angles() gives it.
template <class T>
QOPS_DEVICE void load_four_angles(const HeadsPlan& p, bool turns, uint32_t first, float (&cos)[4], float (&sin)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) cos[i] = sin[i] = __uint_as_float(0x7fc00000u);
  uint32_t position = blockIdx.x, high = 0;
  if (p.positions != nullptr) {
    const uint32_t* words = at_byte<uint32_t>(p.positions, offset_of(p.position_strides, 0));
    position = words[0];
    if (p.positions_are_int64) high = words[1];
  }
  if (!turns || high != 0 || position >= p.table_rows) return;  // negative ones are large
  const void* of_cos = at_byte<char>(p.cos, product(position, p.cos_stride));
  const void* of_sin = at_byte<char>(p.sin, product(position, p.sin_stride));
  if (p.table_is_float32) {
    load_half(static_cast<const float*>(of_cos) + first, cos);
    load_half(static_cast<const float*>(of_sin) + first, sin);
  } else {
    load_half(static_cast<const T*>(of_cos) + first, cos);
    load_half(static_cast<const T*>(of_sin) + first, sin);
  }
}

// A head for kLanes lanes of a warp, a vector for each.
template <class T, int kLanes, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 8) heads_kernel(const __grid_constant__ HeadsPlan p) {
  constexpr uint32_t kHeads = kThreads / kLanes, kHeadsOfWarp = kWarp / kLanes;
  const HeadsPlan::Side& side = blockIdx.y < p.k.first_block ? p.q : p.k;
  const uint32_t head = (blockIdx.y - side.first_block) * kHeads + threadIdx.x / kLanes;
  if (head / kHeadsOfWarp * kHeadsOfWarp >= side.heads) return;  // a whole warp
  const uint32_t lane = threadIdx.x % kLanes, at = (lane < p.vectors ? lane : 0) * kVector;
  const bool is_there = head < side.heads && lane < p.vectors;

  // Everything is asked for before the first wait.
  Words<T> words = {}, w = {};
  if (is_there) load_words(at_byte<T>(side.x, offset_of(side.x_strides, head)) + at, words);
  if (side.is_packed) load_words(static_cast<const T*>(side.weight) + at, w);
  const bool is_first = lane < p.half, turns = lane < p.turning;
  const uint32_t partner = is_first ? lane + p.half : lane - p.half;
  // Of eight pairs of halves two lanes turn four each.
  const uint32_t first = kInterleaved ? at / 2 : is_first ? at : partner * kVector + kVector / 2;
  float cos[4], sin[4];
  load_four_angles<T>(p, turns, first, cos, sin);

  Vector z, squares;
  widen_words<T>(words, z);
#pragma unroll
  for (int i = 0; i < kVector; ++i) squares[i] = z[i] * z[i];
  float sum = sum_of_vector(squares);
#pragma unroll
  for (int stride = kLanes / 2; stride > 0; stride /= 2) sum += __shfl_xor_sync(kAllLanes, sum, stride);
  const float mean = p.inverse_d != 0.0f ? sum * p.inverse_d : sum / p.d;
  const float rstd = 1.0f / sqrtf(mean + p.style.eps);
  if (side.is_packed) {
    normalise_words<T>(z, w, rstd, words);
  } else {
    normalise<true, T>(z, side.weight, side.weight_dtype, at, kVector, rstd, p.style, words);
  }

  if constexpr (kInterleaved) {
    Vector v, turned;
    widen_words<T>(words, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      turned[2 * i] = v[2 * i] * cos[i] - v[2 * i + 1] * sin[i];
      turned[2 * i + 1] = v[2 * i + 1] * cos[i] + v[2 * i] * sin[i];
    }
    if (turns) narrow_words<T>(turned, words);
  } else {
    constexpr int kHalf = kWords<T> / 2;
    uint32_t x1[kHalf], x2[kHalf];
    float a[4], b[4], y1[4], y2[4];
    const auto of_partner = [&](uint32_t word) {
      return __shfl_sync(kAllLanes, word, static_cast<int>(partner), kLanes);
    };
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const uint32_t got = of_partner(is_first ? words[kHalf + i] : words[i]);
      x1[i] = is_first ? words[i] : got;
      x2[i] = is_first ? got : words[kHalf + i];
    }
    widen_words<T>(x1, a);
    widen_words<T>(x2, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y1[i] = a[i] * cos[i] - b[i] * sin[i];
      y2[i] = b[i] * cos[i] + a[i] * sin[i];
    }
    narrow_words<T>(y1, x1);
    narrow_words<T>(y2, x2);
    // And back: y may be x, so a lane writes what it has read and no other.
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const uint32_t got = of_partner(is_first ? x2[i] : x1[i]);
      if (turns) words[i] = is_first ? x1[i] : got;
      if (turns) words[kHalf + i] = is_first ? got : x2[i];
    }
  }
  if (is_there) {
    store_words(const_cast<T*>(at_byte<T>(side.y, offset_of(side.y_strides, head))) + at, words);
  }
}

// Whether they fit, sequences having t tokens.
bool take_strides(const Rows& rows, int64_t t, int64_t head_stride, int64_t size, Strides& strides) {
  const bool is_one = rows.count == t;
  int64_t token = 0, sequence = 0;
  if (rows.dims == 1) {
    token = rows.stride[0];
    sequence = is_one ? 0 : token * t;
  } else if (rows.dims == 2 && rows.size[1] == t) {
    token = rows.stride[1];
    sequence = is_one ? 0 : rows.stride[0];
  } else if (rows.dims != 0) {
    return false;
  }
  const auto take = [size](int64_t stride, int32_t& bytes) {
    bytes = static_cast<int32_t>(stride * size);
    return stride >= INT32_MIN / size && stride <= INT32_MAX / size;
  };
  return take(token, strides.token) && take(sequence, strides.sequence) && take(head_stride, strides.head);
}

// False for what the general kernel has to do.
bool make_plan(const QkNormRotaryParams& params, int64_t heads_of_block, HeadsPlan& plan, dim3& grid) {
  const RotaryParams& p = params.rotary;
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  const auto side = [&](const RotaryHeads& heads, const void* weight, DType weight_dtype, int64_t first_block,
                        HeadsPlan::Side& side) {
    side = {heads.x,
            heads.y,
            weight,
            {},
            {},
            static_cast<uint32_t>(heads.heads),
            static_cast<uint32_t>(first_block),
            weight_dtype,
            size == 2 && weight_dtype == p.dtype && params.style.round_before_weight};
    return take_strides(heads.x_tokens, p.t, heads.x_head_stride, size, side.x_strides) &&
           take_strides(heads.y_tokens, p.t, heads.y_head_stride, size, side.y_strides);
  };
  const auto blocks_of = [&](const RotaryHeads& heads) { return (heads.heads + heads_of_block - 1) / heads_of_block; };
  const int64_t q_blocks = blocks_of(p.q), k_blocks = blocks_of(p.k);
  if (!side(p.q, params.q_weight, params.q_weight_dtype, 0, plan.q)) return false;
  if (!side(p.k, params.k_weight, params.k_weight_dtype, q_blocks, plan.k)) return false;

  const int64_t table_size = static_cast<int64_t>(size_of(p.table_dtype));
  Strides cos{}, sin{};
  if (p.table_dtype != p.dtype && p.table_dtype != DType::kFloat32) return false;
  if (!four_at_a_time(p) || p.table_rows > INT32_MAX) return false;
  if (!take_strides({}, 0, p.cos_row_stride, table_size, cos)) return false;
  if (!take_strides({}, 0, p.sin_row_stride, table_size, sin)) return false;
  if (p.positions != nullptr &&
      !take_strides(p.position_rows, p.t, 0, p.positions_are_int64 ? 8 : 4, plan.position_strides)) {
    return false;
  }
  plan.cos = p.cos;
  plan.sin = p.sin;
  plan.cos_stride = cos.head;
  plan.sin_stride = sin.head;
  plan.table_rows = static_cast<uint32_t>(p.table_rows);
  plan.table_is_float32 = p.table_dtype == DType::kFloat32;
  plan.positions_are_int64 = p.positions_are_int64;
  plan.positions = p.positions;
  plan.vectors = static_cast<uint32_t>(p.d / kVector);
  plan.turning = static_cast<uint32_t>(2 * p.pairs / kVector);
  plan.half = plan.turning / 2;
  plan.d = static_cast<float>(p.d);
  plan.inverse_d = (p.d & (p.d - 1)) == 0 ? 1.0f / plan.d : 0.0f;
  plan.style = params.style;

  constexpr int64_t kMaxGrid = 65535;
  const int64_t sequences = p.q.x_tokens.count / p.t;
  if (p.t > INT32_MAX || q_blocks + k_blocks > kMaxGrid || sequences > kMaxGrid) return false;
  grid = dim3(static_cast<unsigned>(p.t), static_cast<unsigned>(q_blocks + k_blocks), static_cast<unsigned>(sequences));
  return true;
}

template <class T, int kLanes>
Status launch_heads(const HeadsPlan& plan, bool interleaved, dim3 grid, const Queue& queue) {
  const auto kernel = interleaved ? &heads_kernel<T, kLanes, true> : &heads_kernel<T, kLanes, false>;
  return launch(kernel, grid, dim3(kThreads), 0, queue, plan);
}

// --- launches --------------------------------------------------------------------------------------------------------

// Heads that take more of shared memory have no kernel.
constexpr int64_t kMaxShared = 48 << 10;

}  // namespace

Status qk_norm_rotary(const QkNormRotaryParams& params, const Queue& queue) {
  const RotaryParams& p = params.rotary;
  const int64_t rows = p.q.x_tokens.count * (p.q.heads + p.k.heads);
  if (p.d == 0 || rows == 0) return Status::kOk;
  const bool is_aligned =
      aligned(p) && p.d % kVector == 0 && multiple_of_16(params.q_weight) && multiple_of_16(params.k_weight);
  const int lanes = p.d <= 64 ? 8 : p.d <= 128 ? 16 : 32;
  HeadsPlan plan{};
  dim3 grid;
  const bool is_small = p.d <= kVector * kWarp;
  const bool is_planned = is_aligned && is_small && make_plan(params, kThreads / lanes, plan, grid);
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    return with_row_shape(p.d, is_small ? is_planned : is_aligned, [&](auto shape) {
      using Shape = decltype(shape);
      if constexpr (Shape::kThreads == kWarp && Shape::kChunks == 1) {
        if (lanes == 8) return launch_heads<T, 8>(plan, p.interleaved, grid, queue);
        if (lanes == 16) return launch_heads<T, 16>(plan, p.interleaved, grid, queue);
        return launch_heads<T, 32>(plan, p.interleaved, grid, queue);
      } else {
        const int64_t bytes =
            Shape::kRowsOfBlock * ((p.d + kVector - 1) / kVector * kVector) * static_cast<int64_t>(sizeof(T));
        if (bytes > kMaxShared) return Status::kUnsupported;
        return launch_rows<Shape>(&qk_norm_rotary_kernel<T, Shape>, rows, static_cast<size_t>(bytes), queue, params);
      }
    });
  });
}

}  // namespace qops::cuda
