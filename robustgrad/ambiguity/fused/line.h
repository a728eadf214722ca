// Ratios that are linear above a threshold, for chi-square: the active losses are found by discarding the others
// (Michelot), and by a bisection where that does not end. The formulas are those of `_linear.py`.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "row.h"
#include "select.h"

namespace robustgrad {

constexpr double kSlack = 1e-12;  // beyond the rounding of sums over millions
constexpr int kPasses = 24;       // of elimination; ordinary losses need about 6

struct Limit {
  bool ball;
  double number;  // radius or price
};

// Mass from `edge` upwards and below, E(l - edge)_+, and mass squared times the variance above.
struct Sums {
  double mass, rest, rise, spread;

  // Around a centre that is about the mean above the edge: then nothing cancels.
  template <typename Scalar, typename Weight>
  static Sums of(Row<Scalar, Weight> row, double edge, double centre) {
    double mass = 0, rest = 0, rise = 0, first = 0, second = 0;
#pragma omp simd reduction(+ : mass, rest, rise, first, second)
    for (int64_t i = 0; i < row.n; ++i) {
      const double value = row[i], weight = row.weight[i];
      const bool on = value >= edge;
      const double kept = on ? weight : 0.0, away = on ? value - centre : 0.0;
      mass += kept;
      rest += weight - kept;
      rise += kept * (on ? value - edge : 0.0);
      first += kept * away;
      second += kept * away * away;
    }
    const double square = larger(second - first * (first / (mass > 0 ? mass : 1.0)), 0.0);
    return {mass / row.total, rest / row.total, rise / row.total, mass / row.total * (square / row.total)};
  }

  template <typename Scalar, typename Weight>
  static Sums of(Row<Scalar, Weight> row, double edge) {
    const double mass = expect(row, [=](double v) { return v >= edge ? 1.0 : 0.0; });
    const double rise = expect(row, [=](double v) { return v >= edge ? v - edge : 0.0; });
    return of(row, edge, edge + rise / (mass > 0 ? mass : 1.0));
  }

  // Whether the loss at the edge is active; one whose ratio would be rounding alone is not.
  bool active(Limit limit) const {
    if (!limit.ball) return rise < limit.number;
    return spread >= (1 + 64 * kEps) * (2 * limit.number * mass - rest) * rise * rise;
  }
};

// Of what lies above an edge: the sums of its powers, and its smallest.
struct Above {
  double zeroth = 0, first = 0, second = 0, least = kInf;

  // And of `more`, which the row leaves out.
  template <typename Scalar, typename Weight>
  static Above of(Row<Scalar, Weight> row, double edge, const Above& more) {
    double zeroth = 0, first = 0, second = 0, least = more.least;
#pragma omp simd reduction(+ : zeroth, first, second) reduction(min : least)
    for (int64_t i = 0; i < row.n; ++i) {
      const double value = row[i];
      const bool on = value > edge;
      const double kept = on ? row.weight[i] : 0.0, times = kept * value;
      zeroth += kept;
      first += times;
      second += times * value;
      least = lesser(least, on ? value : kInf);
    }
    return {more.zeroth + zeroth / row.total, more.first + first / row.total, more.second + second / row.total, least};
  }

  double mean() const { return first / zeroth; }

  // Where the line of these losses reaches 0, or a little below, so that rounding discards none.
  double zero(Limit limit) const {
    const double square = second / zeroth;
    if (!limit.ball) return mean() - limit.number / zeroth + kSlack * mean();
    const double budget = 2 * limit.number * zeroth * (1 - kSlack) - (1 - zeroth) - kSlack;
    const double variance = std::max(square - mean() * mean(), 0.0) + kSlack * square;
    return budget > 0 ? mean() - std::sqrt(variance / budget) : -kInf;
  }
};

// What is left when losses below the zero of the others' own line are discarded until there are none: that zero only
// ever rises to the right one. `more` are losses beside the row which are known to stay.
template <typename Scalar, typename Weight>
Above eliminate(Row<Scalar, Weight> row, Limit limit, const Above& more = {}) {
  double edge = -kInf;
  auto above = Above::of(row, edge, more);
  for (int pass = 0; pass < kPasses; ++pass) {
    edge = std::max(edge, std::min(above.zero(limit), -kTiny));
    const auto before = std::exchange(above, Above::of(row, edge, more));
    if (above.zeroth == before.zeroth) break;
  }
  return above;
}

// The same in a long row: a sample brackets the zero, what lies above the bracket is summed once, and only what lies
// inside is looked at again. A zero that is not in its bracket shows that the sample misled.
template <typename Scalar>
Above eliminate_long(Row<Scalar, Ones> row, Limit limit) {
  const Sample sample(row, 16);
  const auto some = eliminate(sample.row(), limit);
  const double zero = some.zero(limit), active = some.zeroth * sample.total;
  const double margin = 4 * (some.mean() - zero) / std::sqrt(active), low = zero - margin, high = zero + margin;
  std::vector<double> inside;
  between(row, low, high, inside);
  const Row<double, Ones> within{inside.data(), Ones{}, static_cast<int64_t>(inside.size()), row.total, nullptr, -kInf};
  const auto above = eliminate(within, limit, Above::of(row, high, {}));
  const double found = above.zero(limit);
  return low <= found && found <= high ? above : eliminate(row, limit);
}

template <typename Scalar>
Above eliminate_long(Row<Scalar, const double*> row, Limit limit) {
  return eliminate(row, limit);
}

template <typename Scalar, typename Weight>
void line(Row<Scalar, Weight> row, Limit limit) {
  const auto above = row.n < kLong ? eliminate(row, limit) : eliminate_long(row, limit);
  double least = above.least;
  auto sums = Sums::of(row, least, above.mean());
  if (!sums.active(limit)) {
    least = smallest_active(row, 0.0, [&](double v) { return Sums::of(row, v).active(limit); });
    sums = Sums::of(row, least);
  }
  // Saturated means spread 0: then the slope must be steep whatever is left of the budget.
  const double budget = std::max(2 * limit.number * sums.mass - sums.rest, kEps * kEps);
  const double slope = limit.ball ? std::sqrt(budget / std::max(sums.spread, kSmall)) : 1 / limit.number;
  const double height = (1 - sums.rise * slope) / sums.mass;
  answer(row, [=](double v) { return v >= least ? larger((v - least) * slope + height, 0.0) : 0.0; });
}

}  // namespace robustgrad
