// What the two CPU operators share: a SIMD register as a type, and the declarations that let one call the other.
#pragma once
#include "shared.h"
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <cstring>
#include <tuple>
#include <vector>

namespace medsegr {

Tensor dynamic_conv2d(const Tensor& x, const Tensor& weight, const Optional& gate, const Optional& index);
std::tuple<Tensor, Tensor, Tensor> dynamic_conv2d_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Optional& gate, const Optional& index,
    bool need_x, bool need_weight, bool need_gate);

#ifdef __AVX512F__
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif

// LANES<T> numbers that are added and multiplied at once: the vector extension of GCC and Clang
template <typename T> constexpr int LANES = BYTES / sizeof(T);
template <typename T> struct Register { typedef T type __attribute__((vector_size(BYTES))); };
template <typename T> using Vec = typename Register<T>::type;

template <typename T> inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, BYTES);
  return v;
}

template <typename T> inline void store(T* to, Vec<T> v) { std::memcpy(to, &v, BYTES); }

template <typename T> inline T sum(Vec<T> v) {
  T lane[LANES<T>];
  store(lane, v);
  for (int half = LANES<T> / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// about how many numbers a thread should at least have to compute
constexpr int64_t GRAIN = 1 << 16;

}  // namespace medsegr
