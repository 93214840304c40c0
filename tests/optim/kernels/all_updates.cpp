// Prints a digest of what the compiled kernel computes in every mode and type, for tests that compare machines.
// Built together with arsg_dist/optim/kernels/csrc/*.cpp, without torch and Python.

#include "elements.h"

#include <cstdio>
#include <vector>

struct Job {
  void *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  const void* grad;
  void *correction, *exponents[3];
  double exp_avg_factor, bias_correction2;
  int64_t step, numel, first_index;
};
EXPORTED bool arsg_update(
    const Job*, int64_t, int, int, int, int, double, double, double, double, double, double, double, double, double);

namespace {

constexpr int64_t kNumel = 3001;  // no multiple of a vector's width; two blocks of 8-bit state
uint64_t state = 1;

double uniform() {  // in [-1, 1)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(static_cast<int64_t>(state >> 11)) * 0x1.0p-52 - 1.0;
}

template <typename T>
std::vector<Storage<T>> values(const bool positive) {
  std::vector<Storage<T>> made(kNumel);
  for (auto& value : made) {
    const double number = uniform();
    if constexpr (std::is_same_v<T, EightBitCodes>) {
      value = static_cast<uint8_t>(static_cast<int>(positive ? 255 * std::fabs(number) : 127 * number));
    } else if constexpr (std::is_same_v<T, SplitBits>) {
      value = split_upper(static_cast<float>(number));
    } else {
      value = store<T, double>(positive && number < 0 ? -number : number);
    }
  }
  return made;
}

uint64_t digest = 0;

template <typename T>
void add(const std::vector<T>& tensor) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(tensor.data());
  for (size_t i = 0; i < tensor.size() * sizeof(T); ++i) {
    digest = (digest ^ bytes[i]) * 1099511628211u;
  }
}

template <typename P, typename S>
void update(const int mode, const int param_type, const int state_type) {
  auto x = values<P>(false), g = values<P>(false);
  auto m = values<S>(false), v = values<S>(true), v_hat = values<S>(true);
  std::vector<int16_t> correction(kNumel, 12345);
  std::vector<int8_t> exponents[3] = {{-7, -8}, {-9, -6}, {-5, -8}};
  digest = 14695981039346656037u;
  bool known = true;
  for (int t = 1; t <= 3; ++t) {
    const Job job{x.data(), m.data(), v.data(), v_hat.data(), g.data(), correction.data(),
                  {exponents[0].data(), exponents[1].data(), exponents[2].data()}, 0.9,
                  mode % 3 == 1 ? 0.01 * t : 1.0, t, kNumel, 70001};
    const double coupled = t == 1 ? 0.1 : 0.0, decoupled = t == 2 ? 0.1 : 0.0;
    known = known && arsg_update(&job, 1, 1, mode, param_type, state_type, 0.1, 0.9, 0.99, 0.1, 1e-3, coupled, decoupled,
                                 decoupled / 2, t == 3 ? -1.0 : 1.0);
  }
  add(x), add(m), add(v), add(v_hat), add(correction), add(exponents[0]), add(exponents[1]), add(exponents[2]);
  std::printf("%d %d %d %d %016llx\n", mode, param_type, state_type, known, static_cast<unsigned long long>(digest));
}

template <typename P>
void updates(const int mode, const int param_type) {
  update<P, float>(mode, param_type, 0);
  if constexpr (!std::is_same_v<P, SplitBits>) {
    update<P, double>(mode, param_type, 1);
  }
  update<P, BFloat16Bits>(mode, param_type, 2);
  if constexpr (!std::is_same_v<P, double>) {
    update<P, EightBitCodes>(mode, param_type, 4);
  }
}

} // namespace

int main() {
  for (int mode = 0; mode < 5; ++mode) {
    updates<float>(mode, 0);
    updates<double>(mode, 1);
    updates<BFloat16Bits>(mode, 2);
    updates<HalfBits>(mode, 3);
    updates<SplitBits>(mode, 5);
  }
}
