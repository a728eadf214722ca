// A row of losses, and what every kind of worst case asks of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace robustgrad {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kTiny = std::numeric_limits<double>::min();
constexpr double kMost = std::numeric_limits<double>::max();
constexpr double kSmall = 1.4916681462400413e-154;  // its square is kTiny
constexpr int64_t kLong = 8192;  // losses from which on a sample tells where to begin

// Of values, not references as std::min and std::max: those keep a compiler from making vectors.
inline double lesser(double a, double b) { return a < b ? a : b; }
inline double larger(double a, double b) { return a > b ? a : b; }

// Weights of the uniform base: the compiler leaves the products out.
struct Ones {
  double operator[](int64_t) const { return 1.0; }
};

// Losses that take part, with their base weights, which sum to `total`.
template <typename Weight>
struct Row {
  double* value;
  Weight weight;
  int64_t n;
  double total;
};

// One in `stride` losses of a long row, as a row of its own.
struct Sample {
  std::vector<double> value, weight;
  double total = 0;

  template <typename Weight>
  Sample(const Row<Weight>& row, int64_t stride) {
    for (int64_t i = 0; i < row.n; i += stride) {
      value.push_back(row.value[i]);
      weight.push_back(row.weight[i]);
      total += weight.back();
    }
  }

  Row<const double*> row() {
    return {value.data(), weight.data(), static_cast<int64_t>(value.size()), total > 0 ? total : 1.0};
  }
};

template <typename Weight, typename Function>
inline double expect(const Row<Weight>& row, Function of) {
  const auto [value, weight, n, total] = row;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += weight[i] * of(value[i]);
  return sum / total;
}

template <typename Weight, typename Function>
void replace(const Row<Weight>& row, Function by) {
  double* value = row.value;
#pragma omp simd
  for (int64_t i = 0; i < row.n; ++i) value[i] = by(value[i]);
}

template <typename Weight, typename Test>
inline double least_where(const Row<Weight>& row, Test holds) {
  const double* value = row.value;
  double least = kInf;
#pragma omp simd reduction(min : least)
  for (int64_t i = 0; i < row.n; ++i) least = lesser(least, holds(value[i]) ? value[i] : kInf);
  return least;
}

inline int64_t key_of(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF);
}

// The smallest value that is active, where all above it are: a bisection on the integers in the order of the values,
// whose bounds move on to values of the row. At most 64 steps.
template <typename Weight, typename Active>
inline double smallest_active(const Row<Weight>& row, double top, Active active) {
  int64_t low = key_of(least_where(row, [](double) { return true; })) - 1, high = key_of(top) - 1;
  while (low < high) {
    const int64_t middle = (low >> 1) + (high >> 1) + (low & high & 1);
    const double edge = least_where(row, [=](double v) { return key_of(v) > middle; });
    if (!active(edge)) {
      low = key_of(edge);
      continue;
    }
    high = low;
    for (int64_t i = 0; i < row.n; ++i) {
      const int64_t key = key_of(row.value[i]);
      if (key <= middle) high = std::max(high, key);
    }
  }
  return least_where(row, [=](double v) { return key_of(v) > low; });
}

template <typename Weight>
double mass_of_top(const Row<Weight>& row, double top) {
  return expect(row, [=](double v) { return v == top ? 1.0 : 0.0; });
}

}  // namespace robustgrad
