// Order statistics of a row without weights, without sorting it.
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

#ifdef __AVX512F__
inline __m512d eight(const double* at) { return _mm512_loadu_pd(at); }
inline __m512d eight(const float* at) { return _mm512_cvtps_pd(_mm256_loadu_ps(at)); }

template <typename Scalar>
__m512d eight(const Row<Scalar, Ones>& row, int64_t i) {
  return _mm512_sub_pd(_mm512_max_pd(eight(row.given + i), _mm512_set1_pd(row.lowest)), _mm512_set1_pd(row.shift));
}
#endif

// What lies from `low` up to `high`, and how many above. Without branches, which would be mispredicted.
template <typename Scalar>
int64_t between(Row<Scalar, Ones> row, double low, double high, std::vector<double>& inside) {
  int64_t above = 0;
  constexpr int64_t kBlock = 4096;
  double kept[kBlock + 8];
  for (int64_t i = 0; i < row.n;) {
    const int64_t end = std::min(row.n, i + kBlock);
    int64_t count = 0;
#ifdef __AVX512F__
    for (; i + 8 <= end; i += 8) {
      const __m512d v = eight(row, i);
      const __mmask8 over = _mm512_cmp_pd_mask(v, _mm512_set1_pd(high), _CMP_GT_OQ);
      const __mmask8 in = _mm512_cmp_pd_mask(v, _mm512_set1_pd(low), _CMP_GE_OQ) & ~over;
      above += __builtin_popcount(over);
      _mm512_storeu_pd(kept + count, _mm512_maskz_compress_pd(in, v));
      count += __builtin_popcount(in);
    }
#endif
    for (; i < end; ++i) {
      const double v = row[i];
      const int64_t over = v > high;
      kept[count] = v;
      above += over;
      count += static_cast<int64_t>(v >= low) - over;
    }
    inside.insert(inside.end(), kept, kept + count);
  }
  return above;
}

// The k-th largest, and how many are larger or equal to it.
struct Order {
  double value;
  int64_t above = 0, tied = 0;

  void count(double other) {
    above += other > value;
    tied += other == value;
  }
};

// Of a long row: a sample brackets it, and only what lies in the bracket is searched.
template <typename Scalar>
Order select_long(Row<Scalar, Ones> row, int64_t k) {
  const Sample some(row, static_cast<int64_t>(std::cbrt(static_cast<double>(row.n))));
  const auto size = static_cast<int64_t>(some.value.size());
  const double share = static_cast<double>(k) / static_cast<double>(row.n);
  const auto place = static_cast<int64_t>(share * size);
  std::vector<double> inside;
  for (double width : {3.0, 12.0, kInf}) {
    const double slack = width * std::sqrt(size * share * (1 - share)) + 2;
    const double high = place > slack ? nth_largest(some.value, place - static_cast<int64_t>(slack)) : kInf;
    const double low = place + slack < size ? nth_largest(some.value, place + static_cast<int64_t>(slack)) : -kInf;
    inside.clear();
    const int64_t above = between(row, low, high, inside);
    if (above >= k || k > above + static_cast<int64_t>(inside.size())) continue;
    Order found{nth_largest(inside, k - above), above};
    for (double v : inside) found.count(v);
    return found;
  }
  return {kNaN};  // never: the last bracket holds all
}

template <typename Scalar>
Order select(Row<Scalar, Ones> row, int64_t k) {
  if (row.n >= kLong) return select_long(row, k);
  constexpr int64_t kShort = 512;
  double values[kShort], room[kShort];
  std::vector<double> longer(row.n > kShort ? 2 * row.n : 0);
  double* const value = row.n > kShort ? longer.data() : values;
  for (int64_t i = 0; i < row.n; ++i) value[i] = row[i];
  Order found{nth_largest(value, row.n > kShort ? value + row.n : room, row.n, k)};
  for (int64_t i = 0; i < row.n; ++i) found.count(row[i]);
  return found;
}

}  // namespace robustgrad
