// Exponential tilting, for KL; the formulas are those of `_tilting.py`.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "row.h"

namespace robustgrad {

template <typename... Coefficients>
double polynomial(double x, Coefficients... descending) {
  double sum = 0;
  ((sum = sum * x + descending), ...);
  return sum;
}

// exp for x up to 700, without a call, so that the compiler makes vectors of it: 2^k times a series around 0.
inline double exponential(double x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double bounded = larger(x, -708.0), shifted = bounded * 1.4426950408889634 + kShift, k = shifted - kShift;
  const double r = (bounded - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10;
  const double series = polynomial(r, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                                   1. / 720, 1. / 120, 1. / 24, 1. / 6, 1. / 2, 1., 1.);
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -708.0 ? 0.0 : series * power;
}

template <typename Weight>
void normalise(const Row<Weight>& row, double theta) {
  replace(row, [=](double v) { return exponential(v * theta); });
  const double inverse = 1 / expect(row, [](double v) { return v; });
  replace(row, [=](double v) { return v * inverse; });
}

// h = log KL - log(entropy - KL) at theta, and its slope in log theta.
template <typename Weight>
std::pair<double, double> curve(const Row<Weight>& row, double theta, double best, double depth, bool tight) {
  const auto [value, weight, n, total] = row;
  const double rise = std::min(theta * depth, 30.0);
  double others = 0, first = 0, second = 0;
#pragma omp simd reduction(+ : others, first, second)
  for (int64_t i = 0; i < n; ++i) {
    const double tilted = (value[i] < 0 ? weight[i] : 0.0) * exponential(value[i] * theta + rise);
    others += tilted;
    first += tilted * value[i];
    second += tilted * value[i] * value[i];
  }
  others /= total, first /= total, second /= total;
  const double peak = std::exp(rise) * best, normaliser = peak + others;
  double growth = std::log(normaliser);
  if (tight) {  // The divergence would drown in the rounding of exponentials near 1.
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += weight[i] * std::expm1(value[i] * theta + rise);
    growth = std::log1p(sum / total);
  }
  const double fall = theta * first / normaliser;
  const double divergence = std::max(fall + rise - growth, kSmall);
  const double left = std::max(std::log1p(others / peak) - fall, kSmall);
  const double variance = theta * theta * second / normaliser - fall * fall;
  return {std::log(divergence / left), -variance * std::log(best) / (divergence * left)};
}

// theta with KL(p exp(theta drop) || p) = radius; beyond every gap where none reaches it. In a long row Newton's steps
// begin at that of a sample.
template <typename Weight>
double inverse_temperature(const Row<Weight>& row, double radius) {
  const auto [value, weight, n, total] = row;
  double best = 0, depth = 0, square = 0, span = 0, gap = kInf;
#pragma omp simd reduction(+ : best, depth, square) reduction(max : span) reduction(min : gap)
  for (int64_t i = 0; i < n; ++i) {
    const double v = value[i];
    best += v < 0 ? 0.0 : weight[i];
    depth -= weight[i] * v;
    square += weight[i] * v * v;
    span = larger(span, -v);
    gap = lesser(gap, v < 0 ? -v : kInf);
  }
  best /= total, depth /= total, square /= total;
  const double left = -std::log(best) - radius, variance = square - depth * depth;
  if (!(left > 0)) return 1 / kSmall;
  const double odds = std::max(1.22 * (1 - best) / (best * left), kSmall);
  double low = 0.5 * std::log(8 * radius) - std::log(std::max(span, kSmall));
  double high = std::log(std::max(2 * std::log(odds), 1.0)) - std::log(std::max(gap, kSmall));
  high = std::max(low, high);
  double u = 0.5 * (std::log(2 * radius) - std::log(std::max(variance, kSmall)));
  if (row.n >= 2 * kLong) {
    Sample sample(row, 16);
    const double top = *std::max_element(sample.value.begin(), sample.value.end());
    replace(sample.row(), [=](double v) { return v - top; });
    u = std::log(inverse_temperature(sample.row(), radius));
  }
  u = std::min(std::max(u, low), high);
  const double goal = std::log(radius) - std::log(left);
  double before = 0;
  for (int step = 0; step < 60; ++step) {
    const auto [h, slope] = curve(row, std::exp(u), best, depth, radius < 1e-4);
    (h < goal ? low : high) = u;
    const double move = (goal - h) / std::max(slope, 1e-300), newton = u + move;
    u = newton >= low && newton <= high ? newton : (low + high) / 2;
    // A step so small squares to nothing; and steps shrink with their square, so that the next one can be told.
    if (std::abs(move) <= 1e-7 || std::abs(move * move * move) <= 1e-11 * before * before) break;
    before = u == newton ? move : 0;
  }
  return std::exp(u);
}

}  // namespace robustgrad
