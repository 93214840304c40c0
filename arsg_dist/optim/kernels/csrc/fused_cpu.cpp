// One pass over memory per ARSG step on CPU: reads x, g, m, v, v̂ and writes x, m, v, v̂, 36 bytes per float32 element.
//
// The rule is arsg_dist/optim/kernels/reference.py's, the stochastic rounding arsg_dist/optim/kernels/rounding.py's. Every operation is
// an IEEE add, multiply, divide, square root or comparison, and the compiler is told not to contract them into fused
// multiply-adds: the result depends neither on the instruction set, nor on the number of threads, nor on how a tensor
// is cut into pieces. The loop in `update` must stay free of branches: it is left to the compiler to vectorise.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

// The loader picks the widest version the CPU has, so a build made on a login node runs on any compute node.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif

namespace {

// The first three in the order of `PRECONDITIONERS` in hyperparameters.py; in the others m averages preconditioned
// gradients (precondition_first), which makes no difference without a preconditioner.
enum Mode : int64_t { kAMSGrad = 0, kAdam = 1, kNone = 2, kAMSGradFirst = 3, kAdamFirst = 4 };

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

// One parameter: its tensors, and the scalars that depend on how many updates it has had.
struct Job {
  void *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  const void* grad;
  double exp_avg_factor;    // 1 - mu, over its bias correction where there is one
  double bias_correction2;  // 1 where there is none
  uint32_t step;            // for stochastic rounding only
  int64_t numel;
};

// bfloat16 and float16 are handled as bits: compilers do not vectorise loads and stores of class types.
struct BFloat16Bits {};
struct HalfBits {};
template <typename T>
struct StorageOf {
  using type = T;
};
template <>
struct StorageOf<BFloat16Bits> {
  using type = uint16_t;
};
template <>
struct StorageOf<HalfBits> {
  using type = uint16_t;
};
template <typename T>
using Storage = typename StorageOf<T>::type;

template <typename T, typename A>
inline A load(const Storage<T> stored) {
  if constexpr (std::is_same_v<T, BFloat16Bits>) {
    return static_cast<A>(std::bit_cast<float>(static_cast<uint32_t>(stored) << 16));
  } else if constexpr (std::is_same_v<T, HalfBits>) {
    return static_cast<A>(c10::detail::fp16_ieee_to_fp32_value(stored));
  } else {
    return static_cast<A>(stored);
  }
}

template <typename T, typename A>
inline Storage<T> store(const A value) {
  if constexpr (std::is_same_v<T, BFloat16Bits>) {
    const float single = static_cast<float>(value);
    const uint32_t bits = std::bit_cast<uint32_t>(single);
    const uint32_t nearest_even = (bits + ((bits >> 16) & 1u) + 0x7FFFu) >> 16;
    return static_cast<uint16_t>(single != single ? 0x7FC0u : nearest_even);
  } else if constexpr (std::is_same_v<T, HalfBits>) {
    return c10::detail::fp16_ieee_from_fp32_value(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

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

// The larger of the two; NaN where `value` is NaN. `floor` is not.
template <typename A>
inline A at_least(const A floor, const A value) {
  return floor > value ? floor : value;
}

// NaN wins, as in torch.maximum.
template <typename A>
inline A maximum(const A a, const A b) {
  const A larger = at_least(a, b);
  return a != a ? a : larger;
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

// Cuts the elements of all tensors into equal shares for torch's threads: one fork and join per step, however many
// tensors there are. Shares begin at whole blocks so that vector loads stay aligned.
constexpr int64_t kBlock = 64;
constexpr int64_t kGrainBlocks = 256;

template <Mode kMode, bool kCoupledDecay, typename P, typename S, typename A>
void update_all(const std::vector<Job>& jobs, const Scalars<A>& s) {
  std::vector<int64_t> first_block(jobs.size() + 1, 0);
  for (size_t k = 0; k < jobs.size(); ++k) {
    first_block[k + 1] = first_block[k] + (jobs[k].numel + kBlock - 1) / kBlock;
  }
  at::parallel_for(0, first_block.back(), kGrainBlocks, [&](const int64_t begin, const int64_t end) {
    auto k = static_cast<size_t>(
        std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin() - 1);
    for (; k < jobs.size() && first_block[k] < end; ++k) {
      const Job& job = jobs[k];
      const int64_t from = std::max<int64_t>(begin - first_block[k], 0) * kBlock;
      const int64_t to = std::min((end - first_block[k]) * kBlock, job.numel);
      if (from >= to) {
        continue;
      }
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
          job.step * kStepFactor,
          static_cast<uint32_t>(from) * kIndexFactor);
    }
  });
}

template <Mode kMode, typename P, typename S>
void dispatch_compute(const std::vector<Job>& jobs, const Scalars<double>& s) {
  using A = std::conditional_t<std::is_same_v<P, double>, double, float>;
  // A denominator is never below the smallest normal number: see Hyperparameters.floor.
  const double floor = std::max(is_amsgrad(kMode) ? s.eps : 0.0, double{std::numeric_limits<A>::min()});
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
void dispatch_state(const c10::ScalarType state, const std::vector<Job>& jobs, const Scalars<double>& s) {
  switch (state) {
    case c10::kFloat:
      return dispatch_compute<kMode, P, float>(jobs, s);
    case c10::kDouble:
      return dispatch_compute<kMode, P, double>(jobs, s);
    case c10::kBFloat16:
      return dispatch_compute<kMode, P, BFloat16Bits>(jobs, s);
    default:
      TORCH_CHECK_VALUE(false, "state must be float32, float64 or bfloat16, not ", state);
  }
}

template <Mode kMode>
void dispatch_param(
    const c10::ScalarType param,
    const c10::ScalarType state,
    const std::vector<Job>& jobs,
    const Scalars<double>& s) {
  switch (param) {
    case c10::kFloat:
      return dispatch_state<kMode, float>(state, jobs, s);
    case c10::kDouble:
      return dispatch_state<kMode, double>(state, jobs, s);
    case c10::kBFloat16:
      return dispatch_state<kMode, BFloat16Bits>(state, jobs, s);
    case c10::kHalf:
      return dispatch_state<kMode, HalfBits>(state, jobs, s);
    default:
      TORCH_CHECK_VALUE(false, "parameters must be float32, float64, bfloat16 or float16, not ", param);
  }
}

void check_tensor(const at::Tensor& t, const at::Tensor& param, const c10::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      t.device().is_cpu() && t.layout() == c10::kStrided && t.scalar_type() == dtype && t.sizes() == param.sizes(),
      "expected a strided CPU tensor of ", dtype, " and sizes ", param.sizes(), ", not ", t.scalar_type(), " ",
      t.sizes(), " on ", t.device());
}

// The arguments are those of `StepFunction` and `Hyperparameters` in hyperparameters.py; weight_decay is split into its
// kinds (`opposed_decay` is what of the decoupled one acts also where the update moves x away from 0), bias_correction
// into the two moments'.
// Returns the indices of the parameters left as they are because they have gaps or overlaps in memory, or because
// their gradient or a moment is laid out otherwise: those are the caller's.
std::vector<int64_t> update_(
    at::TensorList params,
    at::TensorList grads,
    at::TensorList exp_avgs,
    at::TensorList exp_avg_sqs,
    at::TensorList max_exp_avg_sqs,
    c10::ArrayRef<int64_t> steps,
    int64_t preconditioner,
    double lr,
    double beta1,
    double beta2,
    double mu,
    double eps,
    double coupled_decay,
    double decoupled_decay,
    double opposed_decay,
    double gradient_factor,
    bool corrects_first,
    bool corrects_second,
    bool precondition_first) {
  const size_t count = params.size();
  TORCH_CHECK_VALUE(
      preconditioner >= kAMSGrad && preconditioner <= kNone, "unknown preconditioner ", preconditioner);
  const bool has_sq = preconditioner != kNone;
  const bool has_max = preconditioner == kAMSGrad;
  const bool is_adam = preconditioner == kAdam;
  TORCH_CHECK_VALUE(is_adam || !(corrects_first || corrects_second), "bias correction is for preconditioner adam");
  std::vector<int64_t> left;
  if (count == 0) {
    return left;
  }
  TORCH_CHECK_VALUE(!exp_avgs.empty(), "exp_avgs must have one entry per parameter");
  const c10::ScalarType param_type = params[0].scalar_type();
  const c10::ScalarType state_type = exp_avgs[0].scalar_type();
  const bool has_steps = is_adam || state_type == c10::kBFloat16;
  TORCH_CHECK_VALUE(
      grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == (has_sq ? count : 0) &&
          max_exp_avg_sqs.size() == (has_max ? count : 0) && (!has_steps || steps.size() == count),
      "the lists that the preconditioner needs must have one entry per parameter, the others none");
  std::vector<Job> jobs;
  jobs.reserve(count);
  for (size_t k = 0; k < count; ++k) {
    const at::Tensor& p = params[k];
    bool direct = p.is_non_overlapping_and_dense();
    const auto data_of = [&](const at::Tensor& t, const c10::ScalarType dtype) {
      check_tensor(t, p, dtype);
      direct = direct && t.strides() == p.strides();
      return t.data_ptr();
    };
    const int64_t step = has_steps ? steps[k] : 0;
    const Job job{
        data_of(p, param_type),
        data_of(exp_avgs[k], state_type),
        has_sq ? data_of(exp_avg_sqs[k], state_type) : nullptr,
        has_max ? data_of(max_exp_avg_sqs[k], state_type) : nullptr,
        data_of(grads[k], param_type),
        corrects_first ? (1.0 - mu) / (1.0 - std::pow(beta1, static_cast<double>(step))) : 1.0 - mu,
        corrects_second ? 1.0 - std::pow(beta2, static_cast<double>(step)) : 1.0,
        static_cast<uint32_t>(step),
        p.numel()};
    if (direct) {
      jobs.push_back(job);
    } else {
      left.push_back(static_cast<int64_t>(k));
    }
  }
  const Scalars<double> s{
      lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, mu, eps, 0.0, gradient_factor, coupled_decay,
      1.0 - lr * decoupled_decay, 1.0 - lr * opposed_decay};
  if (has_max && precondition_first) {
    dispatch_param<kAMSGradFirst>(param_type, state_type, jobs, s);
  } else if (has_max) {
    dispatch_param<kAMSGrad>(param_type, state_type, jobs, s);
  } else if (is_adam && precondition_first) {
    dispatch_param<kAdamFirst>(param_type, state_type, jobs, s);
  } else if (is_adam) {
    dispatch_param<kAdam>(param_type, state_type, jobs, s);
  } else {
    dispatch_param<kNone>(param_type, state_type, jobs, s);
  }
  for (const at::Tensor& p : params) {
    if (!p.is_inference()) {
      p.unsafeGetTensorImpl()->bump_version();  // as every in-place operation: autograd notices a stale graph
    }
  }
  return left;
}

} // namespace

TORCH_LIBRARY(arsg_dist, library) {
  library.def(
      "update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, int[] steps, *, int preconditioner, float lr, float beta1, float beta2, "
      "float mu, float eps, float coupled_decay, float decoupled_decay, float opposed_decay, float gradient_factor, "
      "bool corrects_first, bool corrects_second, bool precondition_first) -> int[]");
}

TORCH_LIBRARY_IMPL(arsg_dist, CPU, library) {
  library.impl("update_", &update_);
}

// Importing the module registers the operator; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.arsg_dist.update_.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
