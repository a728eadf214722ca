// Ratios that are linear above a threshold, for chi-square: the active losses are found by discarding the others
// (Michelot), and by a bisection where that does not end. The formulas are those of `_linear.py`.
#pragma once

#include <cmath>
#include <utility>

#include "row.h"

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
  template <typename Weight>
  static Sums of(const Row<Weight>& row, double edge, double centre) {
    const auto [value, weight, n, total] = row;
    double mass = 0, rest = 0, rise = 0, first = 0, second = 0;
#pragma omp simd reduction(+ : mass, rest, rise, first, second)
    for (int64_t i = 0; i < n; ++i) {
      const bool on = value[i] >= edge;
      const double kept = on ? weight[i] : 0.0, away = on ? value[i] - centre : 0.0;
      mass += kept;
      rest += weight[i] - kept;
      rise += kept * (on ? value[i] - edge : 0.0);
      first += kept * away;
      second += kept * away * away;
    }
    const double square = larger(second - first * (first / (mass > 0 ? mass : 1.0)), 0.0);
    return {mass / total, rest / total, rise / total, mass / total * (square / total)};
  }

  template <typename Weight>
  static Sums of(const Row<Weight>& row, double edge) {
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
  double zeroth, first, second, least;

  template <typename Weight>
  static Above of(const Row<Weight>& row, double edge) {
    const auto [value, weight, n, total] = row;
    double zeroth = 0, first = 0, second = 0, least = kInf;
#pragma omp simd reduction(+ : zeroth, first, second) reduction(min : least)
    for (int64_t i = 0; i < n; ++i) {
      const bool on = value[i] > edge;
      const double kept = on ? weight[i] : 0.0, times = kept * value[i];
      zeroth += kept;
      first += times;
      second += times * value[i];
      least = lesser(least, on ? value[i] : kInf);
    }
    return {zeroth / total, first / total, second / total, least};
  }

  // Where the line of these losses reaches 0, or a little below, so that rounding discards none.
  double zero(Limit limit) const {
    const double mean = first / zeroth, square = second / zeroth;
    if (!limit.ball) return mean - limit.number / zeroth + kSlack * mean;
    const double budget = 2 * limit.number * zeroth * (1 - kSlack) - (1 - zeroth) - kSlack;
    const double variance = std::max(square - mean * mean, 0.0) + kSlack * square;
    return budget > 0 ? mean - std::sqrt(variance / budget) : -kInf;
  }
};

// What is left when losses below the threshold of the others' own line are discarded, beginning at `edge`, until
// there are none: that threshold only ever rises to the right one.
template <typename Weight>
Above eliminate(const Row<Weight>& row, Limit limit, double edge) {
  auto above = Above::of(row, edge);
  if (above.zero(limit) < edge) above = Above::of(row, edge = -kInf);  // A sample began too high.
  for (int pass = 0; pass < kPasses; ++pass) {
    edge = std::max(edge, std::min(above.zero(limit), -kTiny));
    const auto before = std::exchange(above, Above::of(row, edge));
    if (above.zeroth == before.zeroth) break;
  }
  return above;
}

// Where the line of a sample of a long row reaches 0, and a little below.
template <typename Weight>
double beginning(const Row<Weight>& row, Limit limit) {
  if (row.n < kLong) return -kInf;
  Sample sample(row, 16);
  const auto some = sample.row();
  const auto above = eliminate(some, limit, -kInf);
  const double rise = above.first - above.least * above.zeroth;
  return std::min(above.least - 4 * rise / std::sqrt(static_cast<double>(some.n)), -kTiny);
}

template <typename Weight>
void line(const Row<Weight>& row, Limit limit) {
  const auto above = eliminate(row, limit, beginning(row, limit));
  double least = above.least;
  auto sums = Sums::of(row, least, above.first / above.zeroth);
  if (!sums.active(limit)) {
    least = smallest_active(row, 0.0, [&](double v) { return Sums::of(row, v).active(limit); });
    sums = Sums::of(row, least);
  }
  // Saturated means spread 0: then the slope must be steep whatever is left of the budget.
  const double budget = std::max(2 * limit.number * sums.mass - sums.rest, kEps * kEps);
  const double slope = limit.ball ? std::sqrt(budget / std::max(sums.spread, kSmall)) : 1 / limit.number;
  const double height = (1 - sums.rise * slope) / sums.mass;
  replace(row, [=](double v) { return v >= least ? larger((v - least) * slope + height, 0.0) : 0.0; });
}

}  // namespace robustgrad
