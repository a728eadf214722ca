// The worst case of rows of losses on the CPU.
//
// Kinds, numbers and formulas are those of `_triton/rows.py`, which says why they are what they are. What differs is
// the way: a row keeps only the losses that take part. Sums are in float64 and in one thread, so always the same.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "line.h"
#include "row.h"
#include "tilt.h"
#include "top_share.h"

namespace robustgrad {
namespace {

// Distances below the maximum, in units whose squares are safe: a ball sees no scale.
template <typename Weight>
void scale(Row<double, Weight> row, double top) {
  const double lowest = least_where(row, [](double v) { return v > -kMost; });
  const double unit = std::min(std::max(top - lowest, kTiny), kMost);
  answer(row, [=](double v) { return larger((v - top) / unit, -1099511627776.0); });
}

template <typename Weight>
void distance(Row<double, Weight> row, double top) {
  answer(row, [=](double v) { return larger(v - top, -1.6349923815708423e296); });
}

struct Problem {
  std::string kind;
  double numbers[5];
  bool full;  // losses in float64

  template <typename Scalar, typename Weight>
  void solve(Row<Scalar, Weight> row, double top) const {
    if (kind == "plain") return answer(row, [](double) { return 1.0; });
    if (kind == "top") return top_shares(row, top, numbers);
    if (kind == "near") return near(row, top, numbers[0]);
    if (!full) return solve_below(row.below(top));
    // Distances may not fit, or their squares: what they are brought to stands where the ratios will.
    if constexpr (std::is_same_v<Scalar, double>) {
      kind == "price" || kind == "softmax" ? distance(row, top) : scale(row, top);
      row.given = row.ratio;
      solve_below(row);
    }
  }

  // Losses given by how far they are below the maximum.
  template <typename Scalar, typename Weight>
  void solve_below(Row<Scalar, Weight> row) const {
    if (kind == "price") return line(row, Limit{false, numbers[0]});
    if (kind == "ball") return line(row, Limit{true, numbers[0]});
    tilt(row, kind == "softmax" ? 1 / numbers[0] : inverse_temperature(row, numbers[0]));
  }
};

struct Given {
  const double* base;  // nullptr where there is none
  const bool* mask;

  bool any() const { return base || mask; }
  bool has(int64_t i) const { return (!mask || mask[i]) && (!base || base[i] != 0); }
};

// The maximum: NaN where a loss is NaN or +inf.
template <typename Scalar, typename Weight>
double top_of(Row<Scalar, Weight> row) {
  double top = -kInf, wrong = 0;
#pragma omp simd reduction(max : top) reduction(+ : wrong)
  for (int64_t i = 0; i < row.n; ++i) {
    wrong += row.given[i] < kInf ? 0.0 : 1.0;
    top = larger(row[i], top);
  }
  return wrong > 0 ? kNaN : top;
}

// Moves the losses that take part to the front, with weights that sum to about 1, and tells how many; -1 if the base is
// no distribution.
template <typename Scalar>
int64_t compact(const Scalar* losses, Given given, double* value, std::vector<double>& weights, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (given.base && !(given.base[i] >= 0 && given.base[i] < kInf)) return -1;
    if (!given.has(i)) continue;
    value[count++] = static_cast<double>(losses[i]);
    if (given.base) weights.push_back(given.base[i]);
  }
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& weight : weights) weight /= total;
  return count;
}

// Whether the row has an answer.
template <typename Scalar, typename Weight>
bool solve_row(Row<Scalar, Weight> row, const Problem& problem) {
  const double top = top_of(row);
  if (std::isnan(top)) return false;
  if (row.n > 0) problem.solve(row, top);
  return true;
}

// Where only some losses take part, they move to the front of the answer's memory and, solved, back.
template <typename Scalar>
void solve_row(const Scalar* losses, Given given, double* ratio, int64_t n, const Problem& problem) {
  // Where a loss of -inf stands: below all others, with room for its powers.
  const double lowest = problem.full ? -kMost : -1e60;
  std::vector<double> weights;
  const int64_t count = given.any() ? compact(losses, given, ratio, weights, n) : n;
  const auto size = static_cast<double>(count);
  bool solved = count >= 0;
  if (solved && given.base) {
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    solved = solve_row(Row<double, const double*>{ratio, weights.data(), count, total, ratio, lowest}, problem);
  } else if (solved && given.mask) {
    solved = solve_row(Row<double, Ones>{ratio, Ones{}, count, size, ratio, lowest}, problem);
  } else if (solved) {
    solved = solve_row(Row<Scalar, Ones>{losses, Ones{}, n, size, ratio, lowest}, problem);
  }
  if (!solved) {
    for (int64_t i = 0; i < n; ++i) ratio[i] = given.has(i) ? kNaN : 0.0;
  } else if (given.any()) {
    for (int64_t i = n, left = count; i-- > 0;) ratio[i] = given.has(i) ? ratio[--left] : 0.0;
  }
}

template <typename Scalar>
void solve_rows(const at::Tensor& losses, const at::Tensor& base, const at::Tensor& mask, double* ratio,
                const Problem& problem) {
  const int64_t n = losses.size(-1), rows = losses.numel() / n;
  const auto* loss = losses.const_data_ptr<Scalar>();
  // One row of a base or mask may serve all.
  const auto* weight = base.defined() ? base.const_data_ptr<double>() : nullptr;
  const auto* counted = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  const int64_t weight_step = weight && base.dim() > 1 ? n : 0, mask_step = counted && mask.dim() > 1 ? n : 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Given given{weight + row * weight_step, counted + row * mask_step};
    solve_row(loss + row * n, given, ratio + row * n, n, problem);
  }
}

at::Tensor worst_ratio(const at::Tensor& losses, const std::optional<at::Tensor>& base,
                       const std::optional<at::Tensor>& mask, std::string kind, at::ArrayRef<double> numbers) {
  Problem problem{std::move(kind), {}, losses.scalar_type() == at::kDouble};
  std::copy(numbers.begin(), numbers.end(), problem.numbers);
  const auto values = losses.to(problem.full ? at::kDouble : at::kFloat).contiguous();
  const auto weights = base ? base->to(at::kDouble).contiguous() : at::Tensor();
  const auto counted = mask ? mask->contiguous() : at::Tensor();
  auto ratio = at::empty(losses.sizes(), losses.options().dtype(at::kDouble));
  const auto solve = problem.full ? solve_rows<double> : solve_rows<float>;
  solve(values, weights, counted, ratio.mutable_data_ptr<double>(), problem);
  return ratio;
}

}  // namespace
}  // namespace robustgrad

TORCH_LIBRARY_IMPL(robustgrad, CPU, m) { m.impl("worst_ratio", robustgrad::worst_ratio); }
