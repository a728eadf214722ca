// Top shares, for CVaR and total variation: order statistics are selected, nothing is sorted.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "row.h"

namespace robustgrad {

inline double middle(double a, double b, double c) {
  return larger(lesser(a, b), lesser(larger(a, b), c));
}

// The k-th largest; the values and as much room are overwritten. What is above a pivot and what is below are told
// apart without branches, which would be mispredicted.
inline double nth_largest(double* values, double* room, int64_t n, int64_t k) {
  for (int round = 0; n > 1 && round < 64; ++round) {
    const double pivot = middle(values[0], values[n / 2], values[n - 1]);
    int64_t above = 0, below = 0, i = 0;
#ifdef __AVX512F__  // What follows no compiler makes vectors of.
    for (const __m512d at = _mm512_set1_pd(pivot); i + 8 <= n; i += 8) {
      const __m512d v = _mm512_loadu_pd(values + i);
      const __mmask8 over = _mm512_cmp_pd_mask(v, at, _CMP_GT_OQ), under = _mm512_cmp_pd_mask(v, at, _CMP_LT_OQ);
      _mm512_storeu_pd(values + above, _mm512_maskz_compress_pd(over, v));
      _mm512_storeu_pd(room + below, _mm512_maskz_compress_pd(under, v));
      above += __builtin_popcount(over);
      below += __builtin_popcount(under);
    }
#endif
    for (; i < n; ++i) {
      const double v = values[i];
      values[above] = room[below] = v;
      above += v > pivot;
      below += v < pivot;
    }
    if (k <= above) {
      n = above;
    } else if (k <= n - below) {
      return pivot;
    } else {
      k -= n - below;
      n = below;
      std::swap(values, room);
    }
  }
  std::nth_element(values, values + (k - 1), values + n, std::greater<double>());
  return values[k - 1];
}

inline double nth_largest(std::vector<double> values, int64_t k) {
  std::vector<double> room(values.size());
  return nth_largest(values.data(), room.data(), static_cast<int64_t>(values.size()), k);
}

// What lies from `low` to `high`, and how many above. Without branches, which would be mispredicted.
inline int64_t between(const double* value, int64_t n, double low, double high, std::vector<double>& inside) {
  int64_t above = 0;
  constexpr int64_t kBlock = 4096;
  double kept[kBlock + 8];
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min(n, i + kBlock);
    int64_t count = 0;
#ifdef __AVX512F__
    for (; i + 8 <= end; i += 8) {
      const __m512d v = _mm512_loadu_pd(value + i);
      const __mmask8 over = _mm512_cmp_pd_mask(v, _mm512_set1_pd(high), _CMP_GT_OQ);
      const __mmask8 in = _mm512_cmp_pd_mask(v, _mm512_set1_pd(low), _CMP_GE_OQ) & ~over;
      above += __builtin_popcount(over);
      _mm512_storeu_pd(kept + count, _mm512_maskz_compress_pd(in, v));
      count += __builtin_popcount(in);
    }
#endif
    for (; i < end; ++i) {
      kept[count] = value[i];
      above += value[i] > high;
      count += (value[i] >= low) & (value[i] <= high);
    }
    inside.insert(inside.end(), kept, kept + count);
  }
  return above;
}

// The k-th largest of a long row: a sample brackets it, and only what lies in the bracket is searched.
inline double select_long(const double* value, int64_t n, int64_t k) {
  const auto stride = static_cast<int64_t>(std::cbrt(static_cast<double>(n)));
  std::vector<double> some, inside;
  for (int64_t i = 0; i < n; i += stride) some.push_back(value[i]);
  const auto size = static_cast<int64_t>(some.size());
  const double share = static_cast<double>(k) / static_cast<double>(n);
  const auto place = static_cast<int64_t>(share * size);
  for (double width : {3.0, 12.0}) {
    const auto slack = static_cast<int64_t>(width * std::sqrt(size * share * (1 - share))) + 2;
    const double high = place > slack ? nth_largest(some, place - slack) : kInf;
    const double low = place + slack < size ? nth_largest(some, place + slack) : -kInf;
    inside.clear();
    const int64_t above = between(value, n, low, high, inside);
    if (above < k && k <= above + static_cast<int64_t>(inside.size())) return nth_largest(std::move(inside), k - above);
  }
  inside.assign(value, value + n);
  return nth_largest(std::move(inside), k);
}

inline double select(const double* value, int64_t n, int64_t k) {
  if (n >= kLong) return select_long(value, n, k);
  constexpr int64_t kShort = 512;
  double values[kShort], room[kShort];
  if (n > kShort) {
    return nth_largest(std::vector<double>(value, value + n), k);
  }
  std::copy(value, value + n, values);
  return nth_largest(values, room, n, k);
}

inline double quantile(const Row<Ones>& row, double, double amount) {
  const double k = std::ceil(amount * static_cast<double>(row.n));
  return select(row.value, row.n, static_cast<int64_t>(std::min(std::max(k, 1.0), static_cast<double>(row.n))));
}

inline double quantile(const Row<const double*>& row, double top, double amount) {
  return smallest_active(row, top, [&](double edge) {
    return expect(row, [=](double v) { return v > edge ? 1.0 : 0.0; }) < amount + 1e-300;
  });
}

// How much of a loss lies in the top `amount` of the base, times the gain.
struct Share {
  double edge = kInf, above = 0, tied = 0;

  template <typename Weight>
  static Share of(const Row<Weight>& row, double top, double amount, double gain) {
    if (gain == 0) return {};
    const double edge = quantile(row, top, amount);
    const auto [value, weight, n, total] = row;
    double above = 0, tied = 0;
#pragma omp simd reduction(+ : above, tied)
    for (int64_t i = 0; i < n; ++i) {
      above += value[i] > edge ? weight[i] : 0.0;
      tied += value[i] == edge ? weight[i] : 0.0;
    }
    return {edge, gain, gain * std::min(std::max((amount * total - above) / tied, 0.0), 1.0)};
  }

  double at(double v) const { return v > edge ? above : v == edge ? tied : 0.0; }
};

template <typename Weight>
void top_shares(const Row<Weight>& row, double top, const double* numbers) {
  const auto first = Share::of(row, top, numbers[0], numbers[1]), second = Share::of(row, top, numbers[2], numbers[3]);
  const double extra = numbers[4] > 0 ? numbers[4] / mass_of_top(row, top) : 0.0;
  replace(row, [=](double v) { return first.at(v) + second.at(v) + (v == top ? extra : 0.0); });
}

template <typename Weight>
void near(const Row<Weight>& row, double top, double price) {
  const double gone = expect(row, [=](double v) { return v >= top - price ? 0.0 : 1.0; });
  const double extra = gone / mass_of_top(row, top);
  replace(row, [=](double v) { return (v >= top - price ? 1.0 : 0.0) + (v == top ? extra : 0.0); });
}

}  // namespace robustgrad
