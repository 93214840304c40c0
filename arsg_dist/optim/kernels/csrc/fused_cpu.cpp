// One pass over memory per ARSG step on CPU: reads x, g, m, v, v̂ and writes x, m, v, v̂, 36 bytes per float32 element.
//
// The rule is arsg_dist/optim/kernels/reference.py's, the stochastic rounding arsg_dist/optim/kernels/rounding.py's.

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
  double exp_avg_factor;    // 1 - mu, over its bias correction where there is one
  double bias_correction2;  // 1 where there is none
  int64_t step;             // for stochastic rounding only
  int64_t numel;
};
static_assert(sizeof(Job) == 72);

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

template <Mode kMode, bool kCoupledDecay, typename P, typename S, typename A>
MULTIVERSION void update(
    Storage<P>* __restrict param,
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
    A x = load<P, A>(param[i]);
    A g = s.sign * load<P, A>(grad[i]);
    if constexpr (kCoupledDecay) {
      g = g + s.coupled_decay * x;
    }
    A denominator = 1;
    if constexpr (kMode != kNone) {
      // In this order, as torch's: g² by itself overflows fp32 from |g| = 1.8e19 on.
      const A v = s.beta2 * load<S, A>(exp_avg_sq[i]) + (s.one_minus_beta2 * g) * g;
      exp_avg_sq[i] = store_moment<S, 1>(v, index_term, step_term);
      if constexpr (is_amsgrad(kMode)) {
        const A v_hat = at_least(s.floor, maximum(load<S, A>(max_exp_avg_sq[i]), v));
        max_exp_avg_sq[i] = store_moment<S, 2>(v_hat, index_term, step_term);
        denominator = std::sqrt(v_hat);
      } else {
        denominator = std::sqrt(at_least(s.floor, v) / bias_correction2) + s.eps;
      }
    }
    if constexpr (is_first(kMode)) {
      g = g / denominator;
    }
    const A m = s.beta1 * load<S, A>(exp_avg[i]) + s.one_minus_beta1 * g;
    exp_avg[i] = store_moment<S, 0>(m, index_term, step_term);
    A move = exp_avg_factor * m + s.mu * g;
    x = (((move > 0) & (x < 0)) | ((move < 0) & (x > 0)) ? s.keep_opposed : s.keep) * x;
    if constexpr (kMode == kAMSGrad || kMode == kAdam) {
      move = move / denominator;
    }
    param[i] = store<P>(x - s.lr * move);
  }
}

struct Jobs {
  const Job* first;
  int64_t count;
  int threads;
};

template <Mode kMode, bool kCoupledDecay, typename P, typename S, typename A>
void update_all(const Jobs& jobs, const Scalars<A>& s) {
  parallel_elements(jobs.first, jobs.count, jobs.threads, [&](const Job& job, const int64_t from, const int64_t to) {
    update<kMode, kCoupledDecay, P, S, A>(
        static_cast<Storage<P>*>(job.param) + from,
        static_cast<const Storage<P>*>(job.grad) + from,
        static_cast<Storage<S>*>(job.exp_avg) + from,
        job.exp_avg_sq == nullptr ? nullptr : static_cast<Storage<S>*>(job.exp_avg_sq) + from,
        job.max_exp_avg_sq == nullptr ? nullptr : static_cast<Storage<S>*>(job.max_exp_avg_sq) + from,
        to - from,
        s,
        static_cast<A>(job.exp_avg_factor),
        static_cast<A>(job.bias_correction2),
        static_cast<uint32_t>(job.step) * kStepFactor,
        static_cast<uint32_t>(from) * kIndexFactor);
  });
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
      return dispatch_compute<kMode, P, double>(jobs, s), true;
    case kBFloat16:
      return dispatch_compute<kMode, P, BFloat16Bits>(jobs, s), true;
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
