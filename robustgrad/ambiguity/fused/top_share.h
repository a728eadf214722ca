// Top shares, for CVaR and total variation: order statistics are selected, nothing is sorted.
#pragma once

#include <algorithm>
#include <cmath>

#include "row.h"
#include "select.h"

namespace robustgrad {

// The loss at which the top `amount` of the base ends, and the mass above, at and below it.
struct Quantile {
  double edge, above, tied, below;

  template <typename Scalar>
  static Quantile of(Row<Scalar, Ones> row, double, double amount) {
    const auto place = static_cast<int64_t>(std::min(std::max(std::ceil(amount * row.total), 1.0), row.total));
    const Order found = select(row, place);
    const auto above = static_cast<double>(found.above), tied = static_cast<double>(found.tied);
    return {found.value, above, tied, row.total - above - tied};
  }

  static Quantile of(Row<double, const double*> row, double top, double amount) {
    const double edge = smallest_active(row, top, [&](double at) {
      return expect(row, [=](double v) { return v > at ? 1.0 : 0.0; }) < amount + 1e-300;
    });
    double above = 0, tied = 0, below = 0;
    for (int64_t i = 0; i < row.n; ++i) (row[i] > edge ? above : row[i] < edge ? below : tied) += row.weight[i];
    return {edge, above, tied, below};
  }
};

// How much of a loss lies in the top `amount` of the base, times the gain.
struct Share {
  double edge = kInf, above = 0, tied = 0;

  template <typename Scalar, typename Weight>
  static Share of(Row<Scalar, Weight> row, double top, double amount, double gain) {
    if (gain == 0) return {};
    const auto at = Quantile::of(row, top, amount);
    // From the nearer end: a small weight beside nearly all of it would be what rounding leaves.
    const double share = amount < 0.5 ? (amount * row.total - at.above) / at.tied
                                      : 1 - ((1 - amount) * row.total - at.below) / at.tied;
    return {at.edge, gain, gain * std::min(std::max(share, 0.0), 1.0)};
  }

  double at(double v) const { return v > edge ? above : v == edge ? tied : 0.0; }
};

template <typename Scalar, typename Weight>
double mass_of_top(Row<Scalar, Weight> row, double top) {
  return expect(row, [=](double v) { return v == top ? 1.0 : 0.0; });
}

template <typename Scalar, typename Weight>
void top_shares(Row<Scalar, Weight> row, double top, const double* numbers) {
  const auto first = Share::of(row, top, numbers[0], numbers[1]), second = Share::of(row, top, numbers[2], numbers[3]);
  const double extra = numbers[4] > 0 ? numbers[4] / mass_of_top(row, top) : 0.0;
  answer(row, [=](double v) { return first.at(v) + second.at(v) + (v == top ? extra : 0.0); });
}

template <typename Scalar, typename Weight>
void near(Row<Scalar, Weight> row, double top, double price) {
  const double gone = expect(row, [=](double v) { return v >= top - price ? 0.0 : 1.0; });
  const double extra = gone / mass_of_top(row, top);
  answer(row, [=](double v) { return (v >= top - price ? 1.0 : 0.0) + (v == top ? extra : 0.0); });
}

}  // namespace robustgrad
