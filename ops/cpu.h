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

// x [M,C,H,W] with its planes one after the other in memory. PyTorch takes several times as long where they lie as a
// vector of channels per pixel, which the model's features do.
inline Tensor planes(const Tensor& x) {
  const int64_t M = x.size(0), C = x.size(1), HW = x.size(2) * x.size(3), lines = (HW + 63) / 64;
  if (x.is_contiguous() || !x.is_contiguous(at::MemoryFormat::ChannelsLast)) return x.contiguous();
  const Tensor y = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "planes", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, M * lines, 4, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        const int64_t m = line / lines, p = line % lines * 64, last = std::min(p + 64, HW);
        for (int64_t c = 0; c < C; ++c)
          for (int64_t i = p; i < last; ++i) to[(m * C + c) * HW + i] = from[(m * HW + i) * C + c];
      }
    });
  });
  return y;
}

// about how many numbers a thread should at least have to compute
constexpr int64_t GRAIN = 1 << 16;

}  // namespace medsegr
