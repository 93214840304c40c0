// Moments in 8 bits with one exponent per block, as arsg_dist/optim/kernels/eight_bit.py defines them: operation by
// operation the same.

#pragma once

#include "elements.h"

namespace {

constexpr int64_t kEightBitBlock = 2048;
constexpr int8_t kNotFinite = -128;

// +-c^4 * 16^k, with c up to 127 in m and up to 255 in v and v_hat, which have no sign.
struct Signed {
  static constexpr int32_t kTop = 0x4D7817E0;  // bits of 127^4 in float32
  static constexpr float kHighest = 127.0f;
};
struct Unsigned {
  static constexpr int32_t kTop = 0x4F7C05FC;  // of 255^4
  static constexpr float kHighest = 255.0f;
};

inline int32_t magnitude_bits(const float value) {
  return static_cast<int32_t>(std::bit_cast<uint32_t>(value) & 0x7FFFFFFFu);
}

inline bool is_finite_block(const int32_t largest) {
  return largest < 0x7F800000;
}

// The least exponent with which the largest element of a block fits; 16 times as much is 2^25 more in those bits.
template <typename Form>
inline int exponent_of(const int32_t largest) {
  const int exponent = (largest - Form::kTop + 0x1FFFFFF) >> 25;
  return exponent > -30 ? exponent : -30;
}

inline float scale_of(const int exponent) {
  return std::bit_cast<float>(exponent == kNotFinite ? 0x7FC00000u : static_cast<uint32_t>(127 + 4 * exponent) << 23);
}

inline float inverse_of(const int exponent) {
  return std::bit_cast<float>(static_cast<uint32_t>(127 - 4 * exponent) << 23);
}

inline float fourth_power(const float c) {
  const float square = c * c;
  return square * square;
}

inline float decode_signed(const uint8_t code, const float scale) {
  const float c = static_cast<float>(static_cast<int8_t>(code)), power = fourth_power(c);
  return (c < 0.0f ? -power : power) * scale;
}

inline float decode_unsigned(const uint8_t code, const float scale) {
  return fourth_power(static_cast<float>(code)) * scale;
}

// Numbers of at most 256.
inline float whole(const float value) {
  return static_cast<float>(static_cast<int32_t>(value));
}

inline float at_most(const float high, const float value) {
  return value < high ? value : high;
}

inline float uniform(const uint32_t bits16) {
  return static_cast<float>(static_cast<int32_t>(2 * bits16 + 1)) * 0x1p-17f;
}

// The code without sign; `u` decides between the two neighbours.
template <typename Form>
inline float encode(const float value, const float inverse, const float u) {
  const float y = std::fabs(value) * inverse;
  const float low = whole(std::sqrt(std::sqrt(y))), power = fourth_power(low);
  return at_most(Form::kHighest, low + (u * (fourth_power(low + 1.0f) - power) < y - power ? 1.0f : 0.0f));
}

inline uint8_t encode_signed(const float value, const float inverse, const float u) {
  const float c = encode<Signed>(value, inverse, u);
  return static_cast<uint8_t>(static_cast<int8_t>(static_cast<int32_t>(value < 0.0f ? -c : c)));
}

inline uint8_t encode_unsigned(const float value, const float inverse, const float u) {
  return static_cast<uint8_t>(static_cast<int32_t>(encode<Unsigned>(value, inverse, u)));
}

inline uint8_t encode_up(const float value, const float inverse) {
  const float y = std::fabs(value) * inverse;
  const float low = whole(std::sqrt(std::sqrt(y)));
  const float c = low + (fourth_power(low) < y ? 1.0f : 0.0f);
  return static_cast<uint8_t>(static_cast<int32_t>(at_most(Unsigned::kHighest, c)));
}

} // namespace
