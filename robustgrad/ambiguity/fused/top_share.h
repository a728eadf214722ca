// Top shares, for CVaR and total variation: order statistics are selected, nothing is sorted.
#pragma once

#include <algorithm>
#include <cmath>

#include "row.h"
#include "select.h"

namespace robustgrad {

template <typename Scalar>
double quantile(Row<Scalar, Ones> row, double, double amount) {
  const double k = std::ceil(amount * static_cast<double>(row.n));
  const auto place = static_cast<int64_t>(std::min(std::max(k, 1.0), static_cast<double>(row.n)));
  return select(row, place);
}

inline double quantile(Row<double, const double*> row, double top, double amount) {
  return smallest_active(row, top, [&](double edge) {
    return expect(row, [=](double v) { return v > edge ? 1.0 : 0.0; }) < amount + 1e-300;
  });
}

// How much of a loss lies in the top `amount` of the base, times the gain; and the mass of the maximum.
struct Share {
  double edge = kInf, above = 0, tied = 0, best = 0;

  template <typename Scalar, typename Weight>
  static Share of(Row<Scalar, Weight> row, double top, double amount, double gain) {
    if (gain == 0) return {};
    const double edge = quantile(row, top, amount);
    double above = 0, tied = 0, below = 0, best = 0;
#pragma omp simd reduction(+ : above, tied, below, best)
    for (int64_t i = 0; i < row.n; ++i) {
      const double value = row[i], weight = row.weight[i];
      above += value > edge ? weight : 0.0;
      tied += value == edge ? weight : 0.0;
      below += value < edge ? weight : 0.0;
      best += value == top ? weight : 0.0;
    }
    // From the nearer end: a small weight beside nearly all of it would be what rounding leaves.
    const double share =
        amount < 0.5 ? (amount * row.total - above) / tied : 1 - ((1 - amount) * row.total - below) / tied;
    return {edge, gain, gain * std::min(std::max(share, 0.0), 1.0), best / row.total};
  }

  double at(double v) const { return v > edge ? above : v == edge ? tied : 0.0; }
};

template <typename Scalar, typename Weight>
void top_shares(Row<Scalar, Weight> row, double top, const double* numbers) {
  const auto first = Share::of(row, top, numbers[0], numbers[1]), second = Share::of(row, top, numbers[2], numbers[3]);
  const double extra = numbers[4] > 0 ? numbers[4] / first.best : 0.0;
  answer(row, [=](double v) { return first.at(v) + second.at(v) + (v == top ? extra : 0.0); });
}

template <typename Scalar, typename Weight>
void near(Row<Scalar, Weight> row, double top, double price) {
  const double gone = expect(row, [=](double v) { return v >= top - price ? 0.0 : 1.0; });
  const double extra = gone / expect(row, [=](double v) { return v == top ? 1.0 : 0.0; });
  answer(row, [=](double v) { return (v >= top - price ? 1.0 : 0.0) + (v == top ? extra : 0.0); });
}

}  // namespace robustgrad
