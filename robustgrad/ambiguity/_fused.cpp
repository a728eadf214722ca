// The worst case of rows of losses on the CPU, each row solved within the memory of its answer.
//
// Kinds, numbers and formulas are those of `_triton_rows.py`, which says why they are what they are. What differs is
// the way: a row keeps only the losses that take part, order statistics are selected, not sorted, and the active
// losses of a line are found by discarding the others (Michelot). Sums are in float64 and in one thread.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kTiny = std::numeric_limits<double>::min();
constexpr double kMost = std::numeric_limits<double>::max();
constexpr double kSmall = 1.4916681462400413e-154;  // its square is kTiny
constexpr double kSlack = 1e-12;                    // beyond the rounding of sums over millions
constexpr int64_t kLong = 8192;                     // losses from which on a sample tells where to begin
constexpr int kPasses = 24;                         // of elimination; ordinary losses need about 6

// Of values, not references as std::min and std::max: those keep a compiler from making vectors.
double lesser(double a, double b) { return a < b ? a : b; }
double larger(double a, double b) { return a > b ? a : b; }

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

template <typename Weight, typename Function>
double expect(const Row<Weight>& row, Function of) {
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
double least_where(const Row<Weight>& row, Test holds) {
  const double* value = row.value;
  double least = kInf;
#pragma omp simd reduction(min : least)
  for (int64_t i = 0; i < row.n; ++i) least = lesser(least, holds(value[i]) ? value[i] : kInf);
  return least;
}

int64_t key_of(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF);
}

// The smallest value that is active, for values none of which is -0: a bisection on the integers in their order,
// whose bounds move on to values of the row. At most 64 steps.
template <typename Weight, typename Active>
double smallest_active(const Row<Weight>& row, double top, Active active) {
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

// ---- top shares: CVaR, total variation ----

double nth_largest(std::vector<double>& values, int64_t k) {
  std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<double>());
  return values[k - 1];
}

// What lies from `low` to `high`, and how many above. Without branches, which would be mispredicted.
int64_t between(const double* value, int64_t n, double low, double high, std::vector<double>& inside) {
  int64_t above = 0;
#pragma omp simd reduction(+ : above)
  for (int64_t i = 0; i < n; ++i) above += value[i] > high;
  constexpr int64_t kBlock = 4096;
  double kept[kBlock + 8];
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min(n, i + kBlock);
    int64_t count = 0;
#ifdef __AVX512F__  // The one loop that no compiler makes vectors of.
    for (; i + 8 <= end; i += 8) {
      const __m512d v = _mm512_loadu_pd(value + i);
      const __mmask8 in = _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(v, _mm512_set1_pd(low), _CMP_GE_OQ), v,
                                                  _mm512_set1_pd(high), _CMP_LE_OQ);
      _mm512_storeu_pd(kept + count, _mm512_maskz_compress_pd(in, v));
      count += __builtin_popcount(in);
    }
#endif
    for (; i < end; ++i) {
      kept[count] = value[i];
      count += (value[i] >= low) & (value[i] <= high);
    }
    inside.insert(inside.end(), kept, kept + count);
  }
  return above;
}

// The k-th largest. In a long row a sample brackets it, and only what lies in the bracket is searched.
double select(const double* value, int64_t n, int64_t k) {
  std::vector<double> some;
  if (n >= kLong) {
    const auto stride = static_cast<int64_t>(std::cbrt(static_cast<double>(n)));
    for (int64_t i = 0; i < n; i += stride) some.push_back(value[i]);
    const auto size = static_cast<int64_t>(some.size());
    const double share = static_cast<double>(k) / static_cast<double>(n);
    const auto slack = static_cast<int64_t>(3 * std::sqrt(size * share * (1 - share))) + 2;
    const auto place = static_cast<int64_t>(share * size);
    const double high = place > slack ? nth_largest(some, place - slack) : kInf;
    const double low = place + slack < size ? nth_largest(some, place + slack) : -kInf;
    some.clear();
    const int64_t above = between(value, n, low, high, some);
    if (above < k && k <= above + static_cast<int64_t>(some.size())) return nth_largest(some, k - above);
  }
  some.assign(value, value + n);
  return nth_largest(some, k);
}

double quantile(const Row<Ones>& row, double, double amount) {
  const double k = std::ceil(amount * static_cast<double>(row.n));
  return select(row.value, row.n, static_cast<int64_t>(std::min(std::max(k, 1.0), static_cast<double>(row.n))));
}

double quantile(const Row<const double*>& row, double top, double amount) {
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
    const double above = expect(row, [=](double v) { return v > edge ? 1.0 : 0.0; });
    const double tied = expect(row, [=](double v) { return v == edge ? 1.0 : 0.0; });
    return {edge, gain, gain * std::min(std::max((amount - above) / tied, 0.0), 1.0)};
  }

  double at(double v) const { return v > edge ? above : v == edge ? tied : 0.0; }
};

template <typename Weight>
double mass_of_top(const Row<Weight>& row, double top) {
  return expect(row, [=](double v) { return v == top ? 1.0 : 0.0; });
}

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

// ---- lines: chi-square ----

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
  const int64_t size = row.n / 16;
  std::vector<double> values(size), weights(size);
  double total = 0;
  for (int64_t i = 0; i < size; ++i) {
    values[i] = row.value[16 * i];
    total += weights[i] = row.weight[16 * i];
  }
  const Row<const double*> some{values.data(), weights.data(), size, total > 0 ? total : 1.0};
  const auto above = eliminate(some, limit, -kInf);
  const double rise = above.first - above.least * above.zeroth;
  return std::min(above.least - 4 * rise / std::sqrt(static_cast<double>(size)), -kTiny);
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

// ---- tilting: KL ----

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

// theta with KL(p exp(theta drop) || p) = radius; beyond every gap where none reaches it.
template <typename Weight>
double inverse_temperature(const Row<Weight>& row, double radius) {
  const double best = mass_of_top(row, 0.0), left = -std::log(best) - radius;
  if (!(left > 0)) return 1 / kSmall;
  const double depth = -expect(row, [](double v) { return v; }), span = -least_where(row, [](double) { return true; });
  double gap = kInf;
  for (int64_t i = 0; i < row.n; ++i) gap = row.value[i] < 0 ? lesser(gap, -row.value[i]) : gap;
  const double variance = expect(row, [](double v) { return v * v; }) - depth * depth;
  const double odds = std::max(1.22 * (1 - best) / (best * left), kSmall);
  double low = 0.5 * std::log(8 * radius) - std::log(std::max(span, kSmall));
  double high = std::log(std::max(2 * std::log(odds), 1.0)) - std::log(std::max(gap, kSmall));
  high = std::max(low, high);
  double u = 0.5 * (std::log(2 * radius) - std::log(std::max(variance, kSmall)));
  u = std::min(std::max(u, low), high);
  const double goal = std::log(radius) - std::log(left);
  for (int step = 0; step < 60; ++step) {
    const auto [h, slope] = curve(row, std::exp(u), best, depth, radius < 1e-4);
    (h < goal ? low : high) = u;
    const double move = (goal - h) / std::max(slope, 1e-300), newton = u + move;
    u = newton >= low && newton <= high ? newton : (low + high) / 2;
    if (std::abs(move) <= 1e-7) break;
  }
  return std::exp(u);
}

// ---- rows ----

// Distances below the maximum, in units whose squares are safe: a ball sees no scale.
template <typename Weight>
void scale(const Row<Weight>& row, double top, bool full) {
  if (!full) return replace(row, [=](double v) { return v - top; });
  const double lowest = least_where(row, [](double v) { return v > -kMost; });
  const double unit = std::min(std::max(top - lowest, kTiny), kMost);
  replace(row, [=](double v) { return larger((v - top) / unit, -1099511627776.0); });
}

template <typename Weight>
void distance(const Row<Weight>& row, double top, bool full) {
  const double least = full ? -1.6349923815708423e296 : -kMost;
  replace(row, [=](double v) { return larger(v - top, least); });
}

struct Problem {
  std::string kind;
  double numbers[5];
  bool full;  // losses in float64

  template <typename Weight>
  void solve(const Row<Weight>& row, double top) const {
    if (kind == "plain") return replace(row, [](double) { return 1.0; });
    if (kind == "top") return top_shares(row, top, numbers);
    if (kind == "near") return near(row, top, numbers[0]);
    if (kind == "price") {
      distance(row, top, full);
      return line(row, Limit{false, numbers[0]});
    }
    if (kind == "softmax") {
      distance(row, top, full);
      return normalise(row, 1 / numbers[0]);
    }
    scale(row, top, full);
    if (kind == "ball") return line(row, Limit{true, numbers[0]});
    normalise(row, inverse_temperature(row, numbers[0]));
  }
};

struct Given {
  const double* base;  // nullptr where there is none
  const bool* mask;

  bool any() const { return base || mask; }
  bool has(int64_t i) const { return (!mask || mask[i]) && (!base || base[i] != 0); }
};

// Losses as they are solved, and their maximum: NaN where one is NaN or +inf.
template <typename Scalar>
double widen(const Scalar* losses, double* value, int64_t n, double lowest) {
  double top = -kInf, wrong = 0;
#pragma omp simd reduction(max : top) reduction(+ : wrong)
  for (int64_t i = 0; i < n; ++i) {
    const double given = losses[i], kept = larger(given, lowest) + 0.0;  // -0 becomes 0
    wrong += given < kInf ? 0.0 : 1.0;
    value[i] = kept;
    top = larger(kept, top);
  }
  return wrong > 0 ? kNaN : top;
}

// Moves the losses and weights that take part to the front, and tells how many; -1 if the base is no distribution.
template <typename Scalar>
int64_t compact(const Scalar* losses, Given given, double* value, std::vector<double>& weights, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (given.base && !(given.base[i] >= 0 && given.base[i] < kInf)) return -1;
    if (!given.has(i)) continue;
    value[count++] = static_cast<double>(losses[i]);
    if (given.base) weights.push_back(given.base[i]);
  }
  double total = 0;
  for (double weight : weights) total += weight;
  for (double& weight : weights) weight /= total;
  return count;
}

// The answer's memory holds the losses at first; those that take part move to the front and, solved, back.
template <typename Scalar>
void solve_row(const Scalar* losses, Given given, double* ratio, int64_t n, const Problem& problem) {
  // Where a loss of -inf stands: below all others, with room for its powers.
  const double lowest = problem.full ? -kMost : -1e60;
  std::vector<double> weights;
  const int64_t count = given.any() ? compact(losses, given, ratio, weights, n) : n;
  const double top = given.any() ? widen(ratio, ratio, count, lowest) : widen(losses, ratio, n, lowest);
  if (count < 0 || std::isnan(top)) {
    for (int64_t i = 0; i < n; ++i) ratio[i] = given.has(i) ? kNaN : 0.0;
    return;
  }
  if (count > 0 && given.base) {
    problem.solve(Row<const double*>{ratio, weights.data(), count, 1.0}, top);
  } else if (count > 0) {
    problem.solve(Row<Ones>{ratio, Ones{}, count, static_cast<double>(count)}, top);
  }
  if (!given.any()) return;
  for (int64_t i = n, left = count; i-- > 0;) ratio[i] = given.has(i) ? ratio[--left] : 0.0;
}

template <typename Scalar>
void solve_rows(const at::Tensor& losses, const at::Tensor& base, const at::Tensor& mask, double* ratio,
                const Problem& problem) {
  const int64_t n = losses.size(-1), rows = losses.numel() / n;
  const auto* loss = losses.const_data_ptr<Scalar>();
  // One row of a base or mask may serve all.
  const auto* weight = base.defined() ? base.const_data_ptr<double>() : nullptr;
  const auto* counted = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  const int64_t weight_step = weight && base.dim() > 1 ? n : 0, mask_step = counted && mask.dim() > 1 ? n : 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Given given{weight + row * weight_step, counted + row * mask_step};
    solve_row(loss + row * n, given, ratio + row * n, n, problem);
  }
}

at::Tensor worst_ratio(const at::Tensor& losses, const std::optional<at::Tensor>& base,
                       const std::optional<at::Tensor>& mask, std::string kind, at::ArrayRef<double> numbers) {
  Problem problem{std::move(kind), {}, losses.scalar_type() == at::kDouble};
  std::copy(numbers.begin(), numbers.end(), problem.numbers);
  const auto values = losses.to(problem.full ? at::kDouble : at::kFloat).contiguous();
  const auto weights = base ? base->to(at::kDouble).contiguous() : at::Tensor();
  const auto counted = mask ? mask->contiguous() : at::Tensor();
  auto ratio = at::empty(losses.sizes(), losses.options().dtype(at::kDouble));
  const auto solve = problem.full ? solve_rows<double> : solve_rows<float>;
  solve(values, weights, counted, ratio.mutable_data_ptr<double>(), problem);
  return ratio;
}

}  // namespace

TORCH_LIBRARY_IMPL(robustgrad, CPU, m) { m.impl("worst_ratio", worst_ratio); }
