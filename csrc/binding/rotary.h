// Tables of angles and positions of tokens as arguments.
#pragma once

#include "binding/device.h"

namespace qops::binding {

inline void set_tables(const Tensor& cos, const Tensor& sin, RotaryParams& p) {
  p.cos = cos.const_data_ptr();
  p.cos_row_stride = cos.stride(0);
  p.cos_stride = cos.stride(1);
  p.sin = sin.const_data_ptr();
  p.sin_row_stride = sin.stride(0);
  p.sin_stride = sin.stride(1);
  p.table_rows = cos.size(0);
}

// tokens: [..., T], of p.q, which is known. Positions of shape [T] serve every sequence; without any there is a row of
// the tables for each token of a sequence.
inline void take_positions(const Checker& check, const std::optional<Tensor>& positions, Sizes tokens, const Tensor& x,
                           RotaryParams& p) {
  p.t = tokens[tokens.size() - 1];
  if (!positions) {
    if (p.table_rows >= p.t) return;
    check.refuse("cos", "have at least T = " + std::to_string(p.t) + " rows without positions",
                 std::to_string(p.table_rows));
  }
  check.device(*positions, "positions", x);
  check.index_dtype(*positions, "positions");
  p.positions_are_int64 = positions->scalar_type() == ScalarType::Long;
  p.positions = positions->const_data_ptr();
  if (positions->sizes().equals(tokens)) {
    p.position_rows = check.rows(*positions, "positions", 0);
    return;
  }
  if (positions->dim() != 1 || positions->size(0) != p.t) {
    check.refuse("positions", "have shape [T] = [" + std::to_string(p.t) + "] or [..., T] = " + to_string(tokens),
                 to_string(positions->sizes()));
  }
  p.position_rows = Rows{};
  p.position_rows.count = p.q.x_tokens.count;
  p.position_rows.dims = 2;
  p.position_rows.size[0] = p.t == 0 ? 0 : p.q.x_tokens.count / p.t;
  p.position_rows.size[1] = p.t;
  p.position_rows.stride[1] = positions->stride(0);
}

[[noreturn]] inline void refuse_bad_position(const Checker& check, const RotaryParams& p) {
  check.refuse("positions", "lie in [0, " + std::to_string(p.table_rows) + "), the rows of cos",
               std::to_string(*p.bad_position));
}

}  // namespace qops::binding
