// attention_block and mlp_block: the two halves of a decoder layer for a few new tokens, each in one region of threads.
// decoder_layers: whole layers one after another, in one region.
//
// Decoding a token is bound by reading weights, but a chain of operators pays for a call and a parallel region each: in
// a model of 135 million parameters as much time as the reading takes. Here the threads of a team go through the
// operators together and wait for each other where one needs what all have made, some 0.05 us a time.
//
// What is small every thread does for itself (norms and the digits or int8 of the products' rows, some microseconds),
// strips of weights, heads and chunks of positions are cut among them. The arithmetic is that of the operators, from
// the same functions, and each intermediate value is rounded to the dtype where the operator would store it: same bits.
#include <algorithm>

#include "cpu/attend.h"
#include "cpu/block_product.h"
#include "cpu/gated_row.h"
#include "cpu/norm_row.h"
#include "cpu/rotate_head.h"
#include "cpu/scratch.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

// Below it a second thread costs more than it brings: some microseconds for its cache lines.
constexpr int64_t kBytesOfOneThread = 128 << 10;

int64_t weight_bytes(const BlockLinear& linear) {
  return linear.product.n * linear.product.k / (linear.has_8_bits ? 1 : 2);
}

int most_threads(const ThreadPool& pool, const BlockLinear& first, const BlockLinear& second) {
  return weight_bytes(first) + weight_bytes(second) < kBytesOfOneThread ? 1 : pool.threads;
}

void tell_plan(const ThreadPool& pool, const BlockLinear& first, const BlockLinear& second) {
  pool.listener->tell("kernel", QOPS_ISA_NAME);
  pool.listener->tell("threads", most_threads(pool, first, second));
}

template <class T>
void norm_row(const RmsNormParams& p, const T* z, T* y) {
  with_dtype(p.weight_dtype, [&](auto* weight) {
    normalise_row(z, static_cast<std::remove_pointer_t<decltype(weight)> const*>(p.weight), p.h, p.style, y);
    return Status::kOk;
  });
}

template <class T>
const T* row_of_x(const RmsNormParams& p, int64_t row) {
  return static_cast<const T*>(p.x) + p.x_rows.offset(row);
}

template <class T>
void norm_rows(const RmsNormParams& p, T* y) {
  for (int64_t row = 0; row < p.x_rows.count; ++row) norm_row(p, row_of_x<T>(p, row), y + row * p.h);
}

// How a block ends: its last product adds x, or gives rows [rows, H] that are normed first.
template <class T>
struct End {
  const RmsNormParams& norm;       // of x
  const RmsNormParams& post_norm;  // no weight: none
  void* y;

  bool norms() const { return post_norm.weight != nullptr; }

  // Where the last product stores: y, or `rows`.
  BlockLinear linear(BlockLinear last) const {
    if (!norms()) {
      last.product.residual = norm.x;
      last.product.residual_rows = norm.x_rows;
    }
    return last;
  }

  void finish(const Team& team, const T* rows, T* normed) const {
    if (!norms()) return;
    team.wait();
    const Part part(team, norm.x_rows.count);
    for (int64_t row = part.begin; row < part.end; ++row) {
      norm_row(post_norm, rows + row * norm.h, normed);
      add_row(row_of_x<T>(norm, row), normed, static_cast<T*>(y) + row * norm.h, norm.h);
    }
  }
};

// silu_mul of what a weight that does not mix gate and up gives.
template <class T>
void gate_rows(const Team& team, int64_t rows, int64_t columns, const T* gate_up, T* y) {
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  const Part part(team, rows * vectors);
  for (int64_t i = part.begin; i < part.end; ++i) {
    const int64_t row = i / vectors, column = i % vectors * kLanes, n = std::min<int64_t>(kLanes, columns - column);
    const T* gate = gate_up + row * 2 * columns + column;
    store_n(y + row * columns + column, gated<T, true>(load_n(gate, n), load_n(gate + columns, n)), n);
  }
}

// body(team, shared, own) in a team: memory that its threads share, and memory of each.
template <class F>
Status with_memory(const ThreadPool& pool, int most, size_t shared_bytes, size_t own_bytes, const F& body) {
  Scratch memory(shared_bytes + static_cast<size_t>(most) * own_bytes);
  if (!memory.ok()) return Status::kOutOfMemory;
  char* shared = memory.take<char>(0);
  with_team(pool, most, [&](const Team& team) {
    body(team, shared, shared + shared_bytes + static_cast<size_t>(team.rank) * own_bytes);
  });
  return Status::kOk;
}

template <class T>
class MlpHalf {
 public:
  explicit MlpHalf(const MlpBlockParams& p)
      : p_(p), end_{p.norm, p.post_norm, p.y}, last_(end_.linear(p.down)), rows_(p.norm.x_rows.count) {}

  size_t shared_bytes() const { return 3 * Pieces::bytes<T>(rows_ * columns()) + normed_bytes(); }
  size_t own_bytes() const {
    return normed_bytes() + std::max(BlockProduct(p_.gate_up, rows_).bytes(), BlockProduct(last_, rows_).bytes());
  }

  void run(const Team& team, void* shared_memory, void* own_memory) const {
    Pieces shared(shared_memory), own(own_memory);
    const int64_t h = p_.norm.h;
    const bool apart = p_.gate_up.product.epilogue != Epilogue::kSiluMul;
    T* gated = shared.take<T>(rows_ * columns());
    T* gate_up = apart ? shared.take<T>(2 * rows_ * columns()) : gated;
    T* given = end_.norms() ? shared.take<T>(rows_ * h) : static_cast<T*>(p_.y);
    T* normed = own.take<T>(rows_ * h);
    void* digits = own.take<char>(0);
    norm_rows(p_.norm, normed);
    BlockProduct(p_.gate_up, rows_).run(team, normed, gate_up, digits);
    team.wait();
    if (apart) {
      gate_rows(team, rows_, columns(), gate_up, gated);
      team.wait();
    }
    BlockProduct(last_, rows_).run(team, gated, given, digits);
    end_.finish(team, given, normed);
  }

 private:
  int64_t columns() const { return p_.down.product.k; }
  size_t normed_bytes() const { return Pieces::bytes<T>(rows_ * p_.norm.h); }

  const MlpBlockParams& p_;
  const End<T> end_;
  const BlockLinear last_;
  const int64_t rows_;
};

// Heads of q, k and v side by side, [rows, heads, D].
template <class T>
struct Heads {
  const AttentionBlockParams& p;
  T* qkv;
  int64_t q, kv, d;

  int64_t all() const { return q + 2 * kv; }
  T* at(int64_t row, int64_t head) const { return qkv + (row * all() + head) * d; }
  // Where the cache holds a key/value head of a new token.
  T* cached(void* cache, const int64_t (&strides)[3], int64_t row, int64_t head) const {
    const DecodeAttentionParams& a = p.attention;
    const int64_t batch = row / a.t, position = a.s - a.t + row % a.t;
    return static_cast<T*>(cache) + batch * strides[0] + head * strides[1] + position * strides[2];
  }
};

// Norms and rotates a head of q in its place and a head of k on its way to the cache, where a head of v goes as it is.
template <class T>
void place_head(const Heads<T>& heads, int64_t row, int64_t head, const Angles& angles) {
  const AttentionBlockParams& p = heads.p;
  T* x = heads.at(row, head);
  if (head >= heads.q + heads.kv) {
    T* to = heads.cached(p.values, p.attention.v_strides, row, head - heads.q - heads.kv);
    std::memcpy(to, x, static_cast<size_t>(heads.d) * sizeof(T));
    return;
  }
  const bool is_q = head < heads.q;
  const void* weight = is_q ? p.q_norm : p.k_norm;
  if (weight != nullptr) {
    with_dtype(is_q ? p.q_norm_dtype : p.k_norm_dtype, [&](auto* element) {
      normalise_row(x, static_cast<std::remove_pointer_t<decltype(element)> const*>(weight), heads.d, p.norm.style, x);
      return Status::kOk;
    });
  }
  const int64_t pairs = p.rotary.pairs;
  if (pairs > 0) rotate_halves(x, 1, x, 1, pairs, pairs, angles);
  if (is_q) return;
  T* to = heads.cached(p.keys, p.attention.k_strides, row, head - heads.q);
  std::memcpy(to, x, static_cast<size_t>(heads.d) * sizeof(T));
}

template <class T>
void place_heads(const Team& team, const Heads<T>& heads, const Angles& angles) {
  const RotaryParams& rotary = heads.p.rotary;
  const Part part(team, heads.p.norm.x_rows.count * heads.all());
  int64_t angles_of = -1;
  for (int64_t i = part.begin; i < part.end; ++i) {
    const int64_t row = i / heads.all();
    if (rotary.pairs > 0 && row != angles_of) {
      const int64_t position = position_of(rotary, row);
      with_dtype(rotary.table_dtype, [&](auto* element) {
        load_angles<std::remove_pointer_t<decltype(element)>>(rotary, position, 0, rotary.pairs, angles);
        return Status::kOk;
      });
      angles_of = row;
    }
    place_head(heads, row, i % heads.all(), angles);
  }
}

template <class T>
class AttentionHalf {
 public:
  explicit AttentionHalf(const AttentionBlockParams& p)
      : p_(p),
        end_{p.norm, p.post_norm, p.y},
        last_(end_.linear(p.o)),
        rows_(p.norm.x_rows.count),
        plan_(plan_attention(p.attention)) {}

  size_t shared_bytes() const {
    return Pieces::bytes<T>(rows_ * p_.qkv.product.n) + Pieces::bytes<T>(rows_ * attended_columns()) +
           Pieces::bytes<T>(rows_ * p_.norm.h) + (plan_.scratch_bytes() + 63) / 64 * 64;
  }
  size_t own_bytes() const {
    return Pieces::bytes<T>(rows_ * row_columns()) + 2 * Pieces::bytes<float>(angle_floats()) +
           std::max(BlockProduct(p_.qkv, rows_).bytes(), BlockProduct(last_, rows_).bytes());
  }

  void run(const Team& team, void* shared_memory, void* own_memory) const {
    Pieces shared(shared_memory), own(own_memory);
    const int64_t qkv_columns = p_.qkv.product.n;
    DecodeAttentionParams attention = p_.attention;
    const Heads<T> heads{p_, shared.take<T>(rows_ * qkv_columns), attention.q_heads, attention.kv_heads, attention.d};
    T* attended = shared.take<T>(rows_ * attended_columns());
    T* given = end_.norms() ? shared.take<T>(rows_ * p_.norm.h) : static_cast<T*>(p_.y);
    float* partial = shared.take<float>(0);
    attention.q = heads.qkv;
    attention.q_strides[0] = attention.t * qkv_columns;
    attention.q_strides[1] = qkv_columns;
    attention.q_strides[2] = attention.d;
    attention.y = attended;
    T* normed = own.take<T>(rows_ * row_columns());
    const Angles angles{own.take<float>(angle_floats()), own.take<float>(angle_floats())};
    void* digits = own.take<char>(0);

    norm_rows(p_.norm, normed);
    BlockProduct(p_.qkv, rows_).run(team, normed, heads.qkv, digits);
    team.wait();
    place_heads(team, heads, angles);
    team.wait();
    const Part items(team, plan_.items);
    for (int64_t item = items.begin; item < items.end; ++item) attend_chunk<T>(attention, plan_, item, partial);
    team.wait();
    const Part combined(team, rows_ * attention.q_heads);
    for (int64_t row = combined.begin; row < combined.end; ++row) combine_row<T>(attention, plan_, row, partial);
    team.wait();
    BlockProduct(last_, rows_).run(team, attended, given, digits);
    end_.finish(team, given, normed);
  }

 private:
  int64_t attended_columns() const { return p_.attention.q_heads * p_.attention.d; }
  int64_t row_columns() const { return std::max(p_.norm.h, attended_columns()); }
  int64_t angle_floats() const { return (p_.rotary.pairs + kLanes - 1) / kLanes * kLanes; }

  const AttentionBlockParams& p_;
  const End<T> end_;
  const BlockLinear last_;
  const int64_t rows_;
  const AttentionPlan plan_;
};

template <class Half, class Params>
Status run_half(const Params& p, const ThreadPool& pool, const BlockLinear& first, const BlockLinear& last) {
  const Half half(p);
  return with_memory(pool, most_threads(pool, first, last), half.shared_bytes(), half.own_bytes(),
                     [&](const Team& team, void* shared, void* own) { half.run(team, shared, own); });
}

template <class T>
Status run_layers(const DecoderLayersParams& p, const ThreadPool& pool) {
  size_t shared_bytes = 0, own_bytes = 0;
  int most = 1;
  for (int64_t i = 0; i < p.layers; ++i) {
    const AttentionHalf<T> attention(p.attention[i]);
    const MlpHalf<T> mlp(p.mlp[i]);
    shared_bytes = std::max(shared_bytes, std::max(attention.shared_bytes(), mlp.shared_bytes()));
    own_bytes = std::max(own_bytes, std::max(attention.own_bytes(), mlp.own_bytes()));
    most = std::max(most, most_threads(pool, p.mlp[i].gate_up, p.mlp[i].down));
  }
  return with_memory(pool, most, shared_bytes, own_bytes, [&](const Team& team, void* shared, void* own) {
    for (int64_t i = 0; i < p.layers; ++i) {
      if (i > 0) team.wait();
      AttentionHalf<T>(p.attention[i]).run(team, shared, own);
      team.wait();
      MlpHalf<T>(p.mlp[i]).run(team, shared, own);
    }
  });
}

bool has_rows(const RmsNormParams& norm) { return norm.x_rows.count > 0 && norm.h > 0; }

bool has_valid_perm(const BlockLinear& linear) {
  return linear.product.perm == nullptr || valid_permutation_range(linear.product);
}

}  // namespace

Status mlp_block(const MlpBlockParams& p, const ThreadPool& pool) {
  if (!has_rows(p.norm)) return Status::kOk;
  if (pool.listener != nullptr) [[unlikely]] {
    tell_plan(pool, p.gate_up, p.down);
    return Status::kOk;
  }
  if (!has_valid_perm(p.gate_up) || !has_valid_perm(p.down)) return Status::kIndexOutOfRange;
  return with_dtype(p.norm.dtype, [&](auto* element) {
    return run_half<MlpHalf<std::remove_pointer_t<decltype(element)>>>(p, pool, p.gate_up, p.down);
  });
}

Status attention_block(const AttentionBlockParams& p, const ThreadPool& pool) {
  if (!has_rows(p.norm)) return Status::kOk;
  if (pool.listener != nullptr) [[unlikely]] {
    tell_plan(pool, p.qkv, p.o);
    return Status::kOk;
  }
  if (!has_valid_perm(p.qkv) || !has_valid_perm(p.o)) return Status::kIndexOutOfRange;
  if (p.rotary.pairs > 0) {
    if (const Status status = check_positions(p.rotary, pool); status != Status::kOk) return status;
  }
  return with_dtype(p.norm.dtype, [&](auto* element) {
    return run_half<AttentionHalf<std::remove_pointer_t<decltype(element)>>>(p, pool, p.qkv, p.o);
  });
}

Status decoder_layers(const DecoderLayersParams& p, const ThreadPool& pool) {
  if (p.layers == 0 || !has_rows(p.attention[0].norm)) return Status::kOk;
  if (pool.listener != nullptr) [[unlikely]] {
    tell_plan(pool, p.mlp[0].gate_up, p.mlp[0].down);
    return Status::kOk;
  }
  for (int64_t i = 0; i < p.layers; ++i) {
    const AttentionBlockParams& attention = p.attention[i];
    const MlpBlockParams& mlp = p.mlp[i];
    for (const BlockLinear* linear : {&attention.qkv, &attention.o, &mlp.gate_up, &mlp.down}) {
      if (!has_valid_perm(*linear)) return Status::kIndexOutOfRange;
    }
    if (attention.rotary.pairs > 0) {
      if (const Status status = check_positions(attention.rotary, pool); status != Status::kOk) return status;
    }
  }
  return with_dtype(p.attention[0].norm.dtype,
                    [&](auto* element) { return run_layers<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace qops::cpu::QOPS_ISA_NS
