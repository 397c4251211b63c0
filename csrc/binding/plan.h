// A call's plan in one line, as QOPS_LOG=plan writes it and qops.explain() returns it:
//
//   qops.int4_gemm isa=amx m=1 n=4096 k=4096 group_size=128 dtype=bfloat16 -> kernel=avx512 ... threads=2
//
// Left of the arrow stands what the plan depends on, by describe_call(params, visitor), which each binding has for its
// parameters: it names every size and choice once, for the writer of a line (PlanLine) and for the reader of what
// qops.explain() was given (Question). Right of it stands what the kernel tells, asked with these parameters.
#pragma once

#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "binding/checks.h"

namespace qops::binding {

// Whether QOPS_LOG=plan, read when the module is loaded.
extern const bool plans_are_logged;
// Null, or what is wrong with that variable.
const char* log_error();
// Writes the line to stderr, if it is the first of its kind.
void log_plan(const std::string& line);

class PlanLine : public PlanListener {
 public:
  explicit PlanLine(const char* op);

  std::string_view op() const { return op_; }
  void size(const char* name, int64_t value, int64_t multiple = 1);
  void rows(const char* name, const Rows& rows);
  void dtype(const char* name, DType dtype);
  // What follows is left out where it is the first choice, false, or null.
  template <class Enum>
  void choice(const char* name, Enum value, std::initializer_list<const char*> names) {
    if (static_cast<int>(value) != 0) add(name, names.begin()[static_cast<int>(value)]);
  }
  void flag(const char* name, bool value);
  template <class T>
  void given(const char* name, const T* pointer) {
    flag(name, pointer != nullptr);
  }
  template <class F>
  void when_asked(const F&) {}

  void add(const char* name, std::string_view value);
  // After the kernel has told its plan.
  std::string text() const { return is_told_ ? text_ : text_ + " -> nothing to compute"; }

 private:
  std::string_view op_;
  std::string text_;
  bool is_told_ = false;
};

// Arguments of qops.explain() as lines "name=value".
class Question {
 public:
  Question(const char* op, std::string_view arguments);

  std::string_view op() const { return check_.op(); }
  // Not negative, and a multiple of `multiple`.
  void size(const char* name, int64_t& value, int64_t multiple = 1);
  // One dimension, whose stride when_asked() sets.
  void rows(const char* name, Rows& rows);
  void dtype(const char* name, DType& dtype);
  template <class Enum>
  void choice(const char* name, Enum& value, std::initializer_list<const char*> names) {
    value = static_cast<Enum>(index_of(name, names));
  }
  void flag(const char* name, bool& value);
  // A tensor that nobody reads.
  template <class T>
  void given(const char* name, const T*& pointer) {
    bool value = false;
    flag(name, value);
    if (value) pointer = reinterpret_cast<const T*>(this);
  }
  // What follows from the sizes, where all of them are there.
  template <class F>
  void when_asked(const F& f) {
    if (missing_.empty()) f(check_);
  }

  // That each argument was one, and none is missing.
  void finish() const;

 private:
  const std::string* take(const char* name, bool is_optional);
  int index_of(const char* name, std::initializer_list<const char*> names);

  Checker check_;
  std::map<std::string, std::string, std::less<>> given_;
  std::vector<std::string> known_, missing_;
};

using Explain = std::string (*)(const char* op, std::string_view arguments);

// Registers how an operator is explained.
class Explainable {
 public:
  Explainable(const char* op, Explain explain);
};

// The plan of a call of `op`. Throws std::invalid_argument for an operator or arguments that there are not.
std::string explain(std::string_view op, std::string_view arguments);

}  // namespace qops::binding
