// Exponential tilting, for KL; the formulas are those of `_tilting.py`.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "row.h"

namespace robustgrad {

constexpr double kTight = 1e-4;  // radius below which the divergence drowns in the rounding of exponentials near 1

// x y + z, rounded once where the machine can: the same in vectors and in what is left over of them.
[[gnu::always_inline]] inline double fused(double x, double y, double z) {
#ifdef __FMA__
  return __builtin_fma(x, y, z);
#else
  return x * y + z;
#endif
}

template <typename... Coefficients>
[[gnu::always_inline]] inline double polynomial(double x, Coefficients... descending) {
  double sum = 0;
  ((sum = fused(sum, x, descending)), ...);
  return sum;
}

// exp for x up to 700, without a call, so that compilers make vectors of it: 2^k times a series around 0.
[[gnu::always_inline]] inline double exponential(double x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double bounded = larger(x, -708.0), shifted = fused(bounded, 1.4426950408889634, kShift), k = shifted - kShift;
  const double r = fused(k, -1.90821492927058770002e-10, fused(k, -0.693147180369123816490, bounded));
  const double series = polynomial(r, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                                   1. / 720, 1. / 120, 1. / 24, 1. / 6, 1. / 2, 1., 1.);
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -708.0 ? 0.0 : series * power;
}

// exp(theta drop), scaled to mean 1.
template <typename Scalar, typename Weight>
void tilt(Row<Scalar, Weight> row, double theta) {
  answer(row, [=](double v) { return exponential(v * theta); });
  const Row<double, Weight> tilted{row.ratio, row.weight, row.n, row.total, row.ratio, 0.0};
  const double inverse = 1 / expect(tilted, [](double v) { return v; });
  answer(tilted, [=](double v) { return v * inverse; });
}

// h = log KL - log(entropy - KL) at theta, and its slope in log theta.
template <typename Scalar, typename Weight>
std::pair<double, double> curve(Row<Scalar, Weight> row, double theta, double best, double depth, bool tight) {
  const double rise = std::min(theta * depth, 30.0);
  double others = 0, first = 0, second = 0;
#pragma omp simd reduction(+ : others, first, second)
  for (int64_t i = 0; i < row.n; ++i) {
    const double value = row[i], tilted = (value < 0 ? row.weight[i] : 0.0) * exponential(value * theta + rise);
    others += tilted;
    first += tilted * value;
    second += tilted * value * value;
  }
  others /= row.total, first /= row.total, second /= row.total;
  const double peak = std::exp(rise) * best, normaliser = peak + others;
  double growth = std::log(normaliser);
  if (tight) {  // The divergence would drown in the rounding of exponentials near 1.
    double sum = 0;
    for (int64_t i = 0; i < row.n; ++i) sum += row.weight[i] * std::expm1(row[i] * theta + rise);
    growth = std::log1p(sum / row.total);
  }
  const double fall = theta * first / normaliser;
  const double divergence = std::max(fall + rise - growth, kSmall);
  const double left = std::max(std::log1p(others / peak) - fall, kSmall);
  const double variance = theta * theta * second / normaliser - fall * fall;
  return {std::log(divergence / left), -variance * std::log(best) / (divergence * left)};
}

// theta by Newton's steps on h, within a bracket; they begin at the guess, if there is one.
template <typename Scalar, typename Weight>
double newton(Row<Scalar, Weight> row, double radius, double guess) {
  double best = 0, depth = 0, square = 0, span = 0, gap = kInf;
#pragma omp simd reduction(+ : best, depth, square) reduction(max : span) reduction(min : gap)
  for (int64_t i = 0; i < row.n; ++i) {
    const double v = row[i], weight = row.weight[i];
    best += v < 0 ? 0.0 : weight;
    depth -= weight * v;
    square += weight * v * v;
    span = larger(span, -v);
    gap = lesser(gap, v < 0 ? -v : kInf);
  }
  best /= row.total, depth /= row.total, square /= row.total;
  const double left = -std::log(best) - radius, variance = square - depth * depth;
  if (!(left > 0)) return 1 / kSmall;
  const double odds = std::max(1.22 * (1 - best) / (best * left), kSmall);
  double low = 0.5 * std::log(8 * radius) - std::log(std::max(span, kSmall));
  double high = std::log(std::max(2 * std::log(odds), 1.0)) - std::log(std::max(gap, kSmall));
  high = std::max(low, high);
  double u = guess > 0 ? std::log(guess) : 0.5 * (std::log(2 * radius) - std::log(std::max(variance, kSmall)));
  u = std::min(std::max(u, low), high);
  const double goal = std::log(radius) - std::log(left);
  double before = 0;
  for (int step = 0; step < 60; ++step) {
    const auto [h, slope] = curve(row, std::exp(u), best, depth, radius < kTight);
    (h < goal ? low : high) = u;
    const double move = (goal - h) / std::max(slope, 1e-300), next = u + move;
    u = next >= low && next <= high ? next : (low + high) / 2;
    // A step so small squares to nothing; and steps shrink with their square, so that the next one can be told.
    if (std::abs(move) <= 1e-7 || std::abs(move * move * move) <= 1e-11 * before * before) break;
    before = u == next ? move : 0;
  }
  return std::exp(u);
}

// By what share of itself theta has to change for the divergence to be `radius`, by its series there.
struct Step {
  double change;
  bool near, settled;  // whether the series tells the way, and the end of it

  template <typename Scalar, typename Weight>
  static Step of(Row<Scalar, Weight> row, double radius, double theta) {
    double m0 = 0, m1 = 0, m2 = 0, m3 = 0, m4 = 0, m5 = 0;
#pragma omp simd reduction(+ : m0, m1, m2, m3, m4, m5)
    for (int64_t i = 0; i < row.n; ++i) {
      const double z = row[i] * theta, square = z * z, tilted = row.weight[i] * exponential(z);
      m0 += tilted;
      m1 += tilted * z;
      m2 += tilted * square;
      m3 += tilted * square * z;
      m4 += tilted * square * square;
      m5 += tilted * square * square * z;
    }
    const double missing = radius - (m1 / m0 - std::log(m0 / row.total));
    // What is left out of theta may be a tenth of the rounding of a loss.
    const double negligible = 0.1 * std::numeric_limits<Scalar>::epsilon();
    return of_moments(missing, negligible, m1 / m0, m2 / m0, m3 / m0, m4 / m0, m5 / m0);
  }

  // Cumulants of the tilted z give the slopes of the divergence, what is missing of it the change.
  static Step of_moments(double missing, double negligible, double m1, double m2, double m3, double m4, double m5) {
    const double square = m1 * m1, cube = square * m1;
    const double c2 = m2 - square, c3 = m3 - 3 * m1 * m2 + 2 * cube;
    const double c4 = m4 - 4 * m1 * m3 + 6 * square * m2 - 3 * square * square - 3 * c2 * c2;
    const double c5 = m5 - 5 * m1 * m4 + 10 * square * m3 - 10 * cube * m2 + 4 * square * cube - 10 * c3 * c2;
    const double second = (c3 + c2) / 2, third = (c4 / 2 + c3) / 3, fourth = (c5 / 6 + c4 / 2) / 4;
    double x = missing / c2;
    const double bent = std::abs(second * x) + std::abs(third * x * x) + std::abs(fourth * x * x * x);
    if (!(c2 > 0 && bent < c2 / 8)) return {0, false, false};
    for (int turn = 0; turn < 6; ++turn) {
      const double value = polynomial(x, fourth, third, second, c2, -missing);
      x -= value / polynomial(x, 4 * fourth, 3 * third, 2 * second, c2);
    }
    // By how much each term is smaller than the one before.
    const double way = std::abs(x) * (1 + std::sqrt(c2));
    const double left_out = (std::abs(third) * way + std::abs(fourth * x)) * way * std::abs(x * x * x);
    return {x, true, left_out < negligible * c2};
  }
};

// theta with KL(p exp(theta drop) || p) = radius; beyond every gap where none reaches it. In a long row the search
// begins at that of a sample.
template <typename Scalar, typename Weight>
double inverse_temperature(Row<Scalar, Weight> row, double radius) {
  if (row.n < 2 * kLong) return newton(row, radius, 0.0);
  const Sample sample(row, 8);
  double theta = newton(sample.row().below(sample.top), radius, 0.0);
  for (int look = 0; look < 3 && radius >= kTight; ++look) {
    const Step step = Step::of(row, radius, theta);
    if (!step.near) break;
    theta *= 1 + step.change;
    if (step.settled) return theta;
  }
  return newton(row, radius, theta);
}

}  // namespace robustgrad
