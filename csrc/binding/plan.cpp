#include "binding/plan.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>

namespace qops::binding {
namespace {

// Read once, and before any call.
const std::string log_option = [] {
  const char* value = std::getenv("QOPS_LOG");
  return std::string(value == nullptr ? "" : value);
}();
const std::string log_message = log_option.empty() || log_option == "plan"
                                    ? std::string()
                                    : "QOPS_LOG must be plan, or not be set; got " + log_option;

constexpr int64_t kMaxSize = int64_t{1} << 31;

constexpr const char* kDtypes[] = {"float32", "float16", "bfloat16", "int32"};

std::map<std::string, Explain, std::less<>>& explainable() {
  static std::map<std::string, Explain, std::less<>> all;
  return all;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

const bool plans_are_logged = log_option == "plan";

const char* log_error() { return log_message.empty() ? nullptr : log_message.c_str(); }

void log_plan(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string> written;
  const std::lock_guard lock(mutex);
  if (written.insert(line).second) std::fprintf(stderr, "%s\n", line.c_str());
}

PlanLine::PlanLine(const char* op) : PlanListener{}, op_(op), text_(std::string("qops.") + op) {
  hear = [](PlanListener* self, const char* name, const char* text, int64_t number) {
    PlanLine& line = *static_cast<PlanLine*>(self);
    if (!line.is_told_) line.text_ += " ->";
    line.is_told_ = true;
    line.add(name, text == nullptr ? std::to_string(number) : text);
  };
}

void PlanLine::add(const char* name, std::string_view value) {
  text_.append(" ").append(name).append("=").append(value);
}

void PlanLine::size(const char* name, int64_t value, int64_t) { add(name, std::to_string(value)); }
void PlanLine::rows(const char* name, const Rows& rows) { add(name, std::to_string(rows.count)); }
void PlanLine::dtype(const char* name, DType dtype) { add(name, kDtypes[static_cast<int>(dtype)]); }
void PlanLine::flag(const char* name, bool value) {
  if (value) add(name, "True");
}

Question::Question(const char* op, std::string_view arguments) : check_(op) {
  while (!arguments.empty()) {
    const std::string_view line = arguments.substr(0, arguments.find('\n'));
    const size_t equals = std::min(line.find('='), line.size());
    given_.emplace(line.substr(0, equals), line.substr(std::min(equals + 1, line.size())));
    arguments.remove_prefix(std::min(line.size() + 1, arguments.size()));
  }
}

const std::string* Question::take(const char* name, bool is_optional) {
  known_.emplace_back(name);
  const auto found = given_.find(name);
  if (found != given_.end()) return &found->second;
  if (!is_optional) missing_.emplace_back(name);
  return nullptr;
}

void Question::size(const char* name, int64_t& value, int64_t multiple) {
  const std::string* text = take(name, false);
  if (text == nullptr) return;
  const char* end = text->data() + text->size();
  const auto [read, error] = std::from_chars(text->data(), end, value);
  if (error != std::errc() || read != end || value < 0 || value > kMaxSize) {
    check_.refuse(name, "be an integer in 0 .. 2^31", *text);
  }
  if (value % multiple != 0) check_.refuse(name, "be a multiple of " + std::to_string(multiple), *text);
}

void Question::rows(const char* name, Rows& rows) {
  size(name, rows.count);
  rows.dims = 1;
  rows.size[0] = rows.count;
}

int Question::index_of(const char* name, std::initializer_list<const char*> names) {
  const std::string* text = take(name, true);
  if (text == nullptr) return 0;
  const auto found = std::find(names.begin(), names.end(), *text);
  if (found == names.end()) check_.refuse(name, "be one of " + joined({names.begin(), names.end()}), *text);
  return static_cast<int>(found - names.begin());
}

void Question::dtype(const char* name, DType& dtype) {
  const std::string* text = take(name, false);
  if (text == nullptr) return;
  const auto found = std::find(std::begin(kDtypes), std::end(kDtypes), *text);
  if (found == std::end(kDtypes)) {
    check_.refuse(name, "be one of " + joined({std::begin(kDtypes), std::end(kDtypes)}), *text);
  }
  dtype = static_cast<DType>(found - std::begin(kDtypes));
}

void Question::flag(const char* name, bool& value) { value = index_of(name, {"False", "True"}) == 1; }

void Question::finish() const {
  const Checker check("explain");
  for (const auto& [name, value] : given_) {
    if (std::find(known_.begin(), known_.end(), name) == known_.end()) {
      check.fail(std::string(check_.op()) + " takes " + joined(known_) + ", got " + name);
    }
  }
  if (!missing_.empty()) check.fail(std::string(check_.op()) + " needs " + joined(missing_) + ", got none");
}

Explainable::Explainable(const char* op, Explain explain) { explainable().emplace(op, explain); }

std::string explain(std::string_view op, std::string_view arguments) {
  const auto found = explainable().find(op);
  if (found != explainable().end()) return found->second(found->first.c_str(), arguments);
  std::vector<std::string> names;
  for (const auto& [name, explain] : explainable()) names.push_back(name);
  Checker("explain").refuse("op", "be one of " + joined(names), std::string(op));
}

}  // namespace qops::binding
