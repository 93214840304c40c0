// One pass over memory per ARSG step on CPU: reads x, g, m, v, v̂ and writes x, m, v, v̂, 36 bytes per float32 element.
//
// The rule is arsg_dist/optim/kernels/reference.py's, the stochastic rounding arsg_dist/optim/kernels/rounding.py's.

#include "eight_bit.h"
#include "elements.h"
#include "parallel.h"

#include <limits>

namespace {

// As cpu_library.py numbers them: the first three in the order of `PRECONDITIONERS` in hyperparameters.py; in the others
// m averages preconditioned gradients (precondition_first), which makes no difference without a preconditioner.
enum Mode : int { kAMSGrad = 0, kAdam = 1, kNone = 2, kAMSGradFirst = 3, kAdamFirst = 4 };

constexpr bool is_amsgrad(const Mode mode) {
  return mode == kAMSGrad || mode == kAMSGradFirst;
}
constexpr bool is_first(const Mode mode) {
  return mode == kAMSGradFirst || mode == kAdamFirst;
}

// One group's settings in the compute type A. `keep` is what decoupled weight decay leaves of x, `keep_opposed` what it
// leaves where the update moves x away from 0: the same, or all with cautious decay.
template <typename A>
struct Scalars {
  A lr, beta1, one_minus_beta1, beta2, one_minus_beta2, mu, eps, floor, sign, coupled_decay, keep, keep_opposed;
};

// One parameter: its tensors, and what depends on how many updates it has had. Packed by cpu_library.py.
struct Job {
  void *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  const void* grad;
  void* correction;    // of a split master, else nothing
  void* exponents[3];  // of m, v, v_hat in 8 bits, else nothing
  double exp_avg_factor;    // 1 - mu, over its bias correction where there is one
  double bias_correction2;  // 1 where there is none
  int64_t step;             // for stochastic rounding only
  int64_t numel;
  int64_t first_index;  // of the first element in the whole parameter, for stochastic rounding
};
static_assert(sizeof(Job) == 112);

// The hash of rounding.py: 16 random bits from the element's position in memory, the step and the moment's slot.
// The terms of position and step are multiplied by their factors already (kIndexFactor, kStepFactor).
constexpr uint32_t kIndexFactor = 0x9E3779B1u;
constexpr uint32_t kStepFactor = 0x85EBCA77u;
constexpr uint32_t kSlotFactor = 0xC2B2AE3Du;

inline uint32_t random_bits(const uint32_t index_term, const uint32_t step_term, const uint32_t slot) {
  uint32_t h = index_term + (step_term + slot * kSlotFactor);
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h ^= h >> 15;
  h *= 0x846CA68Bu;
  h ^= h >> 16;
  return h >> 16;
}

// Moments in bfloat16 are rounded up or down at random so that small changes survive in the mean.
template <typename T, uint32_t kSlot, typename A>
inline Storage<T> store_moment(const A value, const uint32_t index_term, const uint32_t step_term) {
  if constexpr (std::is_same_v<T, BFloat16Bits>) {
    const float single = static_cast<float>(value);
    const uint32_t bits = std::bit_cast<uint32_t>(single);
    const uint32_t rounded = (bits + random_bits(index_term, step_term, kSlot)) >> 16;
    return static_cast<uint16_t>(single != single ? 0x7FC0u : rounded);  // infinity has no bits to carry
  } else {
    return static_cast<T>(value);
  }
}

template <typename P, typename A>
inline A load_param(const Storage<P> param, [[maybe_unused]] const int16_t* correction) {
  if constexpr (std::is_same_v<P, SplitBits>) {
    return join(param, *correction);
  } else {
    return load<P, A>(param);
  }
}

template <typename P, typename A>
inline void store_param(Storage<P>& param, [[maybe_unused]] int16_t* correction, const A value) {
  if constexpr (std::is_same_v<P, SplitBits>) {
    param = split_upper(value);
    *correction = split_correction(value);
  } else {
    param = store<P>(value);
  }
}

// Updates one element: x, m, v and v_hat (the latter two where the mode has them).
template <Mode kMode, bool kCoupledDecay, typename A>
inline void update_element(
    A& x, A g, A& m, A& v, A& v_hat, const Scalars<A>& s, const A exp_avg_factor, const A bias_correction2) {
  g = s.sign * g;
  if constexpr (kCoupledDecay) {
    g = g + s.coupled_decay * x;
  }
  A denominator = 1;
  if constexpr (kMode != kNone) {
    // In this order, as torch's: g² by itself overflows fp32 from |g| = 1.8e19 on.
    v = s.beta2 * v + (s.one_minus_beta2 * g) * g;
    if constexpr (is_amsgrad(kMode)) {
      v_hat = at_least(s.floor, maximum(v_hat, v));
      denominator = std::sqrt(v_hat);
    } else {
      denominator = std::sqrt(at_least(s.floor, v) / bias_correction2) + s.eps;
    }
  }
  if constexpr (is_first(kMode)) {
    g = g / denominator;
  }
  m = s.beta1 * m + s.one_minus_beta1 * g;
  A move = exp_avg_factor * m + s.mu * g;
  x = (((move > 0) & (x < 0)) | ((move < 0) & (x > 0)) ? s.keep_opposed : s.keep) * x;
  if constexpr (kMode == kAMSGrad || kMode == kAdam) {
    move = move / denominator;
  }
  x = x - s.lr * move;
}

template <Mode kMode, bool kCoupledDecay, typename P, typename S, typename A>
MULTIVERSION void update(
    Storage<P>* __restrict param,
    int16_t* __restrict correction,
    const Storage<P>* __restrict grad,
    Storage<S>* __restrict exp_avg,
    Storage<S>* __restrict exp_avg_sq,
    Storage<S>* __restrict max_exp_avg_sq,
    const int64_t numel,
    const Scalars<A> s,
    const A exp_avg_factor,
    const A bias_correction2,
    const uint32_t step_term,
    uint32_t index_term) {
  for (int64_t i = 0; i < numel; ++i, index_term += kIndexFactor) {
    A x = load_param<P, A>(param[i], correction + i), m = load<S, A>(exp_avg[i]), v = 0, v_hat = 0;
    if constexpr (kMode != kNone) {
      v = load<S, A>(exp_avg_sq[i]);
    }
    if constexpr (is_amsgrad(kMode)) {
      v_hat = load<S, A>(max_exp_avg_sq[i]);
    }
    update_element<kMode, kCoupledDecay>(x, load<P, A>(grad[i]), m, v, v_hat, s, exp_avg_factor, bias_correction2);
    store_param<P>(param[i], correction + i, x);
    exp_avg[i] = store_moment<S, 0>(m, index_term, step_term);
    if constexpr (kMode != kNone) {
      exp_avg_sq[i] = store_moment<S, 1>(v, index_term, step_term);
    }
    if constexpr (is_amsgrad(kMode)) {
      max_exp_avg_sq[i] = store_moment<S, 2>(v_hat, index_term, step_term);
    }
  }
}

// Where a block's moments are: codes and exponents of m, v, v_hat.
struct EightBitMoments {
  uint8_t* codes[3];
  int8_t* exponents[3];
};

// Rounds the new moments of one block, when its largest elements are known.
template <uint32_t kSlot>
inline void store_block(
    const float* __restrict values,
    const int32_t largest,
    uint8_t* __restrict codes,
    int8_t& exponent,
    const int64_t numel,
    const uint32_t step_term,
    uint32_t index_term) {
  using Form = std::conditional_t<kSlot == 0, Signed, Unsigned>;
  if (!is_finite_block(largest)) {
    exponent = kNotFinite;
    for (int64_t i = 0; i < numel; ++i) {
      codes[i] = 0;
    }
    return;
  }
  exponent = static_cast<int8_t>(exponent_of<Form>(largest));
  const float inverse = inverse_of(exponent);
  for (int64_t i = 0; i < numel; ++i, index_term += kIndexFactor) {
    if constexpr (kSlot == 2) {
      codes[i] = encode_up(values[i], inverse);
    } else {
      const float u = uniform(random_bits(index_term, step_term, kSlot));
      codes[i] = kSlot == 0 ? encode_signed(values[i], inverse, u) : encode_unsigned(values[i], inverse, u);
    }
  }
}

inline int32_t larger(const int32_t a, const int32_t b) {
  return a > b ? a : b;
}

// One block, whose new moments have to be known before the first of them can be stored.
template <Mode kMode, bool kCoupledDecay, typename P>
MULTIVERSION void update_block(
    Storage<P>* __restrict param,
    int16_t* __restrict correction,
    const Storage<P>* __restrict grad,
    const EightBitMoments moments,
    const int64_t numel,
    const Scalars<float> s,
    const float exp_avg_factor,
    const float bias_correction2,
    const uint32_t step_term,
    const uint32_t index_term) {
  float ms[kEightBitBlock], vs[kEightBitBlock], v_hats[kEightBitBlock];
  const uint8_t* __restrict m_codes = moments.codes[0];
  const uint8_t* __restrict v_codes = moments.codes[1];
  const uint8_t* __restrict v_hat_codes = moments.codes[2];
  const float m_scale = scale_of(*moments.exponents[0]);
  const float v_scale = kMode == kNone ? 0.0f : scale_of(*moments.exponents[1]);
  const float v_hat_scale = is_amsgrad(kMode) ? scale_of(*moments.exponents[2]) : 0.0f;
  int32_t most_m = 0, most_v = 0, most_v_hat = 0;
  for (int64_t i = 0; i < numel; ++i) {
    float x = load_param<P, float>(param[i], correction + i), m = decode_signed(m_codes[i], m_scale), v = 0, v_hat = 0;
    if constexpr (kMode != kNone) {
      v = decode_unsigned(v_codes[i], v_scale);
    }
    if constexpr (is_amsgrad(kMode)) {
      v_hat = decode_unsigned(v_hat_codes[i], v_hat_scale);
    }
    update_element<kMode, kCoupledDecay>(x, load<P, float>(grad[i]), m, v, v_hat, s, exp_avg_factor, bias_correction2);
    store_param<P>(param[i], correction + i, x);
    ms[i] = m;
    most_m = larger(most_m, magnitude_bits(m));
    if constexpr (kMode != kNone) {
      vs[i] = v;
      most_v = larger(most_v, magnitude_bits(v));
    }
    if constexpr (is_amsgrad(kMode)) {
      v_hats[i] = v_hat;
      most_v_hat = larger(most_v_hat, magnitude_bits(v_hat));
    }
  }
  store_block<0>(ms, most_m, moments.codes[0], *moments.exponents[0], numel, step_term, index_term);
  if constexpr (kMode != kNone) {
    store_block<1>(vs, most_v, moments.codes[1], *moments.exponents[1], numel, step_term, index_term);
  }
  if constexpr (is_amsgrad(kMode)) {
    store_block<2>(v_hats, most_v_hat, moments.codes[2], *moments.exponents[2], numel, step_term, index_term);
  }
}

struct Jobs {
  const Job* first;
  int64_t count;
  int threads;
};

// `moved` of nothing is nothing.
template <typename T>
inline T* moved(void* start, const int64_t by) {
  return start == nullptr ? nullptr : static_cast<T*>(start) + by;
}

template <Mode kMode, bool kCoupledDecay, typename P, typename S, typename A>
void update_all(const Jobs& jobs, const Scalars<A>& s) {
  constexpr bool is_eight_bit = std::is_same_v<S, EightBitCodes>;
  const auto part = [&](const Job& job, const int64_t from, const int64_t to) {
    const uint32_t step_term = static_cast<uint32_t>(job.step) * kStepFactor;
    const auto term = [&](const int64_t index) { return static_cast<uint32_t>(job.first_index + index) * kIndexFactor; };
    auto* const param = static_cast<Storage<P>*>(job.param);
    auto* const grad = static_cast<const Storage<P>*>(job.grad);
    const A factor = static_cast<A>(job.exp_avg_factor), correction2 = static_cast<A>(job.bias_correction2);
    if constexpr (is_eight_bit) {
      for (int64_t begin = from; begin < to; begin += kEightBitBlock) {
        const int64_t numel = to - begin < kEightBitBlock ? to - begin : kEightBitBlock, block = begin / kEightBitBlock;
        const EightBitMoments moments{
            {moved<uint8_t>(job.exp_avg, begin), moved<uint8_t>(job.exp_avg_sq, begin),
             moved<uint8_t>(job.max_exp_avg_sq, begin)},
            {moved<int8_t>(job.exponents[0], block), moved<int8_t>(job.exponents[1], block),
             moved<int8_t>(job.exponents[2], block)}};
        update_block<kMode, kCoupledDecay, P>(
            param + begin, moved<int16_t>(job.correction, begin), grad + begin, moments, numel, s, factor, correction2,
            step_term, term(begin));
      }
    } else {
      update<kMode, kCoupledDecay, P, S, A>(
          param + from, moved<int16_t>(job.correction, from), grad + from, moved<Storage<S>>(job.exp_avg, from),
          moved<Storage<S>>(job.exp_avg_sq, from), moved<Storage<S>>(job.max_exp_avg_sq, from), to - from, s, factor,
          correction2, step_term, term(from));
    }
  };
  parallel_elements<is_eight_bit ? kEightBitBlock : 64>(jobs.first, jobs.count, jobs.threads, part);
}

template <Mode kMode, typename P, typename S>
void dispatch_compute(const Jobs& jobs, const Scalars<double>& s) {
  using A = std::conditional_t<std::is_same_v<P, double>, double, float>;
  // A denominator is never below the smallest normal number: see Hyperparameters.floor.
  const double floor = at_least(double{std::numeric_limits<A>::min()}, is_amsgrad(kMode) ? s.eps : 0.0);
  const auto a = [](const double value) { return static_cast<A>(value); };
  const Scalars<A> scalars{
      a(s.lr), a(s.beta1), a(s.one_minus_beta1), a(s.beta2), a(s.one_minus_beta2), a(s.mu), a(s.eps), a(floor),
      a(s.sign), a(s.coupled_decay), a(s.keep), a(s.keep_opposed)};
  if (s.coupled_decay != 0.0) {
    update_all<kMode, true, P, S, A>(jobs, scalars);
  } else {
    update_all<kMode, false, P, S, A>(jobs, scalars);
  }
}

template <Mode kMode, typename P>
bool dispatch_state(const int state, const Jobs& jobs, const Scalars<double>& s) {
  switch (state) {
    case kFloat32:
      return dispatch_compute<kMode, P, float>(jobs, s), true;
    case kFloat64:
      if constexpr (!std::is_same_v<P, SplitBits>) {
        return dispatch_compute<kMode, P, double>(jobs, s), true;
      }
      return false;
    case kBFloat16:
      return dispatch_compute<kMode, P, BFloat16Bits>(jobs, s), true;
    case kEightBit:
      if constexpr (!std::is_same_v<P, double>) {
        return dispatch_compute<kMode, P, EightBitCodes>(jobs, s), true;
      }
      return false;
    default:
      return false;
  }
}

template <Mode kMode>
bool dispatch_param(const int param, const int state, const Jobs& jobs, const Scalars<double>& s) {
  switch (param) {
    case kFloat32:
      return dispatch_state<kMode, float>(state, jobs, s);
    case kFloat64:
      return dispatch_state<kMode, double>(state, jobs, s);
    case kBFloat16:
      return dispatch_state<kMode, BFloat16Bits>(state, jobs, s);
    case kFloat16:
      return dispatch_state<kMode, HalfBits>(state, jobs, s);
    case kSplit:
      return dispatch_state<kMode, SplitBits>(state, jobs, s);
    default:
      return false;
  }
}

} // namespace

// The arguments are those of `Hyperparameters` in hyperparameters.py; weight_decay is split into its kinds
// (`opposed_decay` is what of the decoupled one acts also where the update moves x away from 0); `gradient_factor` has
// the sign of `maximize`. Returns whether the
// mode and the types are known; only then is anything touched.
EXPORTED bool arsg_update(
    const Job* jobs,
    const int64_t count,
    const int threads,
    const int mode,
    const int param_type,
    const int state_type,
    const double lr,
    const double beta1,
    const double beta2,
    const double mu,
    const double eps,
    const double coupled_decay,
    const double decoupled_decay,
    const double opposed_decay,
    const double gradient_factor) {
  const Jobs all{jobs, count, threads};
  const Scalars<double> s{
      lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, mu, eps, 0.0, gradient_factor, coupled_decay,
      1.0 - lr * decoupled_decay, 1.0 - lr * opposed_decay};
  switch (mode) {
    case kAMSGrad:
      return dispatch_param<kAMSGrad>(param_type, state_type, all, s);
    case kAdam:
      return dispatch_param<kAdam>(param_type, state_type, all, s);
    case kNone:
      return dispatch_param<kNone>(param_type, state_type, all, s);
    case kAMSGradFirst:
      return dispatch_param<kAMSGradFirst>(param_type, state_type, all, s);
    case kAdamFirst:
      return dispatch_param<kAdamFirst>(param_type, state_type, all, s);
    default:
      return false;
  }
}
