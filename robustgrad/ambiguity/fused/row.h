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

// Losses that take part, read as they are given, with their base weights, which sum to `total`, and the room for their
// ratios, which may be that of the losses. Handed over by value: then a compiler sees that a loop changes none of it.
template <typename Scalar, typename Weight>
struct Row {
  const Scalar* given;
  Weight weight;
  int64_t n;
  double total;
  double* ratio;
  double lowest;       // where what is below it stands
  double shift = 0.0;  // taken off every loss

  double operator[](int64_t i) const { return larger(given[i], lowest) - shift; }

  Row below(double top) const {
    Row moved = *this;
    moved.shift = top;
    return moved;
  }
};

// One in `stride` losses of a long row, as a row of its own.
struct Sample {
  std::vector<double> value, weight;
  double total = 0, top = -kInf;

  template <typename Scalar, typename Weight>
  Sample(Row<Scalar, Weight> row, int64_t stride) : value((row.n + stride - 1) / stride), weight(value.size()) {
    for (size_t i = 0; i < value.size(); ++i) {
      value[i] = row[i * stride];
      weight[i] = row.weight[i * stride];
      total += weight[i];
      top = larger(value[i], top);
    }
  }

  Row<double, const double*> row() const {
    const auto n = static_cast<int64_t>(value.size());
    return {value.data(), weight.data(), n, total > 0 ? total : 1.0, nullptr, -kInf};
  }
};

template <typename Scalar, typename Weight, typename Function>
inline double expect(Row<Scalar, Weight> row, Function of) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < row.n; ++i) sum += row.weight[i] * of(row[i]);
  return sum / row.total;
}

template <typename Scalar, typename Weight, typename Function>
inline void answer(Row<Scalar, Weight> row, Function ratio_of) {
#pragma omp simd
  for (int64_t i = 0; i < row.n; ++i) row.ratio[i] = ratio_of(row[i]);
}

template <typename Scalar, typename Weight, typename Test>
inline double least_where(Row<Scalar, Weight> row, Test holds) {
  double least = kInf;
#pragma omp simd reduction(min : least)
  for (int64_t i = 0; i < row.n; ++i) least = lesser(least, holds(row[i]) ? row[i] : kInf);
  return least;
}

inline int64_t key_of(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF);
}

// The smallest value that is active, where all above it are: a bisection on the integers in the order of the values,
// whose bounds move on to values of the row. At most 64 steps.
template <typename Scalar, typename Weight, typename Active>
inline double smallest_active(Row<Scalar, Weight> row, double top, Active active) {
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
      const int64_t key = key_of(row[i]);
      if (key <= middle) high = std::max(high, key);
    }
  }
  return least_where(row, [=](double v) { return key_of(v) > low; });
}

}  // namespace robustgrad
