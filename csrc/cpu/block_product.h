// A linear inside of a block of operators, of dense rows of floats: what multiplies int8 quantises them first, by the
// functions of the operators that do. Each thread of a team does that for itself, as it prepares x (team_product.h).
#pragma once

#include <algorithm>

#include "cpu/quantize_row.h"
#include "cpu/scratch.h"
#include "cpu/team_product.h"

namespace qops::cpu::QOPS_ISA_NS {

// The part of n items of a member of a team. Strips are cut where four of them end: so many a tile has at M = 1.
struct Part {
  int64_t begin, end;

  Part(const Team& team, int64_t n, int64_t unit = 1)
      : begin(cut(n, unit, team.rank, team.size)), end(cut(n, unit, team.rank + 1, team.size)) {}

 private:
  static int64_t cut(int64_t n, int64_t unit, int64_t rank, int64_t size) {
    return std::min(n, (n * rank / size + unit - 1) / unit * unit);
  }
};

class BlockProduct {
 public:
  BlockProduct(const BlockLinear& linear, int64_t rows) : linear_(linear), rows_(rows) {}

  // What each thread needs.
  size_t bytes() const {
    size_t sum = linear_.input == BlockInput::kFloat ? 0 : Quantised::bytes(linear_, rows_);
    Quantised rows;
    int32_t zero_point = 0;
    rows.zero_point = &zero_point;  // of which bytes() asks whether they are there
    with_operator(nullptr, nullptr, rows, [&](const auto& p, const auto& functions) { sum += functions.bytes(p); });
    return sum;
  }

  // y = R(x @ w.T + bias) of this thread's part, or with its epilogue.
  template <class T>
  void run(const Team& team, const T* x, T* y, void* memory) const {
    Pieces own(memory);
    Quantised rows;
    if (linear_.input != BlockInput::kFloat) {
      rows = Quantised(linear_, rows_, own);
      for (int64_t row = 0; row < rows_; ++row) quantise(x + row * linear_.product.k, row, rows);
    }
    with_operator(x, y, rows, [&](const auto& p, const auto& functions) {
      void* prepared = own.take<char>(0);
      functions.prepare(p, prepared);
      const Part part(team, (p.n + kStripRows - 1) / kStripRows, 4);
      functions.multiply(p, prepared, part.begin, part.end);
    });
  }

 private:
  // Rows of x as the operators of int8 take them.
  struct Quantised {
    int8_t* q = nullptr;
    float* scale = nullptr;
    int32_t* zero_point = nullptr;

    Quantised() = default;
    Quantised(const BlockLinear& linear, int64_t rows, Pieces& memory)
        : q(memory.take<int8_t>(rows * linear.product.k)),
          scale(memory.take<float>(rows)),
          zero_point(memory.take<int32_t>(rows)) {}

    static size_t bytes(const BlockLinear& linear, int64_t rows) {
      return Pieces::bytes<int8_t>(rows * linear.product.k) + Pieces::bytes<float>(rows) + Pieces::bytes<int32_t>(rows);
    }
  };

  template <class T>
  void quantise(const T* x, int64_t row, const Quantised& to) const {
    const int64_t k = linear_.product.k;
    const auto by = [&](QuantizeRule rule) { quantise_row(x, k, Int8Output{to.q, to.scale, rule}, row); };
    const auto with_zero_points = [&](bool divides) {
      quantise_row_asym(x, row, QuantizeInt8AsymParams{x, {}, {}, k, divides, to.q, to.scale, to.zero_point});
    };
    switch (linear_.input) {
      case BlockInput::kFloat: return;
      case BlockInput::k127: return by(QuantizeRule::k127);
      case BlockInput::kCompressedTensors: return by(QuantizeRule::kCompressedTensors);
      case BlockInput::kTorchao: return by(QuantizeRule::kTorchao);
      case BlockInput::k255: return with_zero_points(false);
      case BlockInput::kCompressedTensorsAsym: return with_zero_points(true);
    }
  }

  // f(parameters, functions) of the operator that multiplies.
  template <class F>
  void with_operator(const void* x, void* y, const Quantised& rows, const F& f) const {
    const WeightOnlyGemmParams& linear = linear_.product;
    const DType dtype = linear.dtype;
    const Rows x_rows = dense_rows(rows_, linear.k), of_scales = dense_rows(rows_, 1);
    if (linear_.input != BlockInput::kFloat && linear_.has_8_bits) {
      Int8GemmParams p{};
      static_cast<EpilogueParams&>(p) = linear;
      p.q = rows.q;
      p.q_rows = x_rows;
      p.scale = rows.scale;
      p.scale_rows = of_scales;
      p.zero_point = has_zero_points(linear_.input) ? rows.zero_point : nullptr;
      p.zero_point_rows = of_scales;
      p.packed = linear.packed;
      p.w_scale = linear.scales;
      p.bias = linear.bias;
      p.y = y;
      p.dtype = dtype;
      p.w_scale_dtype = linear.scale_dtype;
      p.bias_dtype = linear.bias_dtype;
      p.n = linear.n;
      p.k = linear.k;
      return f(p, int8_team_product(dtype));
    }
    Int4Int8GemmParams p{};
    static_cast<WeightOnlyGemmParams&>(p) = linear;
    p.x_rows = x_rows;
    p.y = y;
    if (linear_.input != BlockInput::kFloat) {
      p.x = rows.q;
      p.x_scale = rows.scale;
      p.x_scale_rows = of_scales;
      return f(p, int4_int8_team_product(dtype));
    }
    p.x = x;
    const WeightOnlyGemmParams& of_floats = p;
    f(of_floats, linear_.has_8_bits ? int8_weight_only_team_product(dtype) : int4_team_product(dtype));
  }

  const BlockLinear& linear_;
  const int64_t rows_;
};

}  // namespace qops::cpu::QOPS_ISA_NS
