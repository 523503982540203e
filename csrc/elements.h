// Bytes and elements in memory, and the fp32 arithmetic on them, for host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SYNCDPO_FN __host__ __device__ __forceinline__
#define SYNCDPO_CALLED __host__ __device__ __noinline__  // its registers and code stand once
#else
#define SYNCDPO_FN inline
#define SYNCDPO_CALLED inline
#endif

#ifdef __CUDA_ARCH__
#define SYNCDPO_UNROLL _Pragma("unroll")
#define SYNCDPO_ROLLED _Pragma("unroll 1")
#else
#define SYNCDPO_UNROLL
#define SYNCDPO_ROLLED
#endif

namespace syncdpo {

enum class DType : int32_t { uint8, int16, float16, bfloat16, float32 };

template <class T>
SYNCDPO_FN T smaller(T a, T b) { return b < a ? b : a; }

template <class T>
SYNCDPO_FN T larger(T a, T b) { return a < b ? b : a; }

// ---- Memory ---------------------------------------------------------------------------------

template <class T>
SYNCDPO_FN T read(const char* address) {
#ifdef __CUDA_ARCH__
  return *reinterpret_cast<const T*>(address);
#else
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
#endif
}

template <class T>
SYNCDPO_FN void write(char* address, const T& value) {
#ifdef __CUDA_ARCH__
  *reinterpret_cast<T*>(address) = value;
#else
  std::memcpy(address, &value, sizeof value);
#endif
}

struct alignas(16) Chunk {
  uint32_t word[4];
};

// The 16 bytes at any address, by aligned accesses. The caller vouches for the aligned chunks that
// they lie in.
SYNCDPO_FN Chunk read_chunk(const char* address) {
  const uint32_t past = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) & 15);
  const Chunk low = read<Chunk>(address - past);
  if (past == 0) return low;
  const Chunk high = read<Chunk>(address - past + 16);
  uint32_t word[8];
  for (int i = 0; i < 4; ++i) {
    word[i] = low.word[i];
    word[i + 4] = high.word[i];
  }
  // Selects instead of word[i + past / 4], which would move the array from registers to memory.
  if (past & 8)
    for (int i = 0; i < 6; ++i) word[i] = word[i + 2];
  if (past & 4)
    for (int i = 0; i < 5; ++i) word[i] = word[i + 1];
  Chunk result;
  for (int i = 0; i < 4; ++i) {
    const uint64_t pair = static_cast<uint64_t>(word[i + 1]) << 32 | word[i];
    result.word[i] = static_cast<uint32_t>(pair >> (8 * (past & 3)));
  }
  return result;
}

// ---- Elements: fp32 arithmetic on every dtype, rounded to nearest even ------------------------

SYNCDPO_FN float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

SYNCDPO_FN uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

template <DType dtype>
struct Element;

template <>
struct Element<DType::uint8> {
  using type = uint8_t;
  static SYNCDPO_FN float load(uint8_t x) { return x; }
  static SYNCDPO_FN uint8_t store(float x) { return static_cast<uint8_t>(rintf(x)); }
};

template <>
struct Element<DType::int16> {
  using type = int16_t;
  static SYNCDPO_FN float load(int16_t x) { return x; }
  static SYNCDPO_FN int16_t store(float x) { return static_cast<int16_t>(rintf(x)); }
};

template <>
struct Element<DType::float32> {
  using type = float;
  static SYNCDPO_FN float load(float x) { return x; }
  static SYNCDPO_FN float store(float x) { return x; }
};

template <>
struct Element<DType::bfloat16> {
  using type = uint16_t;
  static SYNCDPO_FN float load(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
  static SYNCDPO_FN uint16_t store(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

template <>
struct Element<DType::float16> {
  using type = uint16_t;
  static SYNCDPO_FN float load(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
    const uint32_t exponent = x >> 10 & 31, mantissa = x & 0x3ff;
    if (exponent == 0)  // a subnormal: a multiple of 2^-24
      return float_of(bits_of(static_cast<float>(mantissa) * 5.9604644775390625e-8f) | sign);
    const uint32_t biased = exponent == 31 ? 255 : exponent + 112;
    return float_of(sign | biased << 23 | mantissa << 13);
  }
  static SYNCDPO_FN uint16_t store(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000, bits = bits_of(x) & 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000)
      half = 0x7e00;  // NaN
    else if (bits >= 0x47800000)
      half = 0x7c00;  // 65536 and above: infinity
    else if (bits < 0x38800000)
      half = static_cast<uint32_t>(rintf(float_of(bits) * 16777216.0f));  // below 2^-14
    else
      half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    return static_cast<uint16_t>(sign | half);
  }
};

SYNCDPO_FN int64_t item_size(DType dtype) {
  return dtype == DType::uint8 ? 1 : dtype == DType::float32 ? 4 : 2;
}

// from + weight * (to - from), each step rounded: the same bits as PyTorch's, on host and device.
SYNCDPO_FN float blend(float from, float to, float weight) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(from, __fmul_rn(weight, __fsub_rn(to, from)));
#else
  return from + weight * (to - from);
#endif
}

}  // namespace syncdpo
