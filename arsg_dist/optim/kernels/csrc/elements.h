// How elements are stored, read and rounded; shared by the kernels of this folder.
//
// Every operation is an IEEE add, multiply, divide, square root or comparison, and the compiler is told not to contract
// them into fused multiply-adds: a result depends neither on the instruction set, nor on the number of threads, nor on
// how a tensor is cut into pieces. Loops must stay free of branches: they are left to the compiler to vectorise.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

// The loader picks the widest version the CPU has, so a build made on a login node runs on any compute node. Elsewhere
// (aarch64, where NEON is in every CPU) there is one version.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif

// What Python calls; everything else is hidden.
#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

// As cpu_library.py numbers them.
enum Type : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kEightBit = 4, kSplit = 5 };

// bfloat16 and float16 are handled as bits: compilers do not vectorise loads and stores of class types.
struct BFloat16Bits {};
struct HalfBits {};
struct SplitBits {};  // bfloat16 with the 16 bits that it lacks of its master beside it (split_master.py)
struct EightBitCodes {};  // with an exponent for each block beside them (eight_bit.h)
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
template <>
struct StorageOf<SplitBits> {
  using type = uint16_t;
};
template <>
struct StorageOf<EightBitCodes> {
  using type = uint8_t;
};
template <typename T>
using Storage = typename StorageOf<T>::type;

// float16 by exact scaling, as FP16 (Marat Dukhan, MIT licence) and torch do it: the same bits, subnormals included.
inline float half_to_float(const uint16_t stored) {
  const uint32_t w = static_cast<uint32_t>(stored) << 16;
  const uint32_t two_w = w + w;
  const float normal = std::bit_cast<float>((two_w >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = std::bit_cast<float>((two_w >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = two_w < (1u << 27) ? std::bit_cast<uint32_t>(subnormal) : std::bit_cast<uint32_t>(normal);
  return std::bit_cast<float>((w & 0x80000000u) | magnitude);
}

inline uint16_t half_from_float(const float value) {
  const uint32_t w = std::bit_cast<uint32_t>(value);
  const uint32_t two_w = w + w;
  const uint32_t exponent = two_w & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const float scaled = (std::fabs(value) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t magnitude = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  return static_cast<uint16_t>((w & 0x80000000u) >> 16 | (two_w > 0xFF000000u ? 0x7E00u : magnitude));
}

template <typename T, typename A>
inline A load(const Storage<T> stored) {
  if constexpr (std::is_same_v<T, BFloat16Bits> || std::is_same_v<T, SplitBits>) {
    return static_cast<A>(std::bit_cast<float>(static_cast<uint32_t>(stored) << 16));
  } else if constexpr (std::is_same_v<T, HalfBits>) {
    return static_cast<A>(half_to_float(stored));
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
    return half_from_float(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// The float32 master of a bfloat16 parameter: itself and the 16 bits that it lacks.
inline float join(const uint16_t param, const int16_t correction) {
  return std::bit_cast<float>((static_cast<uint32_t>(param) << 16) + static_cast<uint32_t>(int32_t{correction}));
}

inline uint16_t split_upper(const float master) {
  const uint32_t upper = (std::bit_cast<uint32_t>(master) + 0x8000u) >> 16;
  return static_cast<uint16_t>(master != master ? 0x7FC0u : upper);
}

inline int16_t split_correction(const float master) {
  const uint32_t bits = std::bit_cast<uint32_t>(master);
  return static_cast<int16_t>(master != master ? 0u : bits - (((bits + 0x8000u) >> 16) << 16));
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

} // namespace
