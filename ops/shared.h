// What the CPU and the CUDA operators share.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <optional>
#include <string>
#include <type_traits>

namespace medsegr {

using at::Tensor;
using Optional = std::optional<Tensor>;

// float32 sums for float16 and bfloat16; kernels, gates and offsets come in this type as well
template <typename scalar_t> struct Sum { using type = float; };
template <> struct Sum<double> { using type = double; };

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A gradient that is not asked for. Each is a tensor of its own: no two results of an operator may be the same one.
inline Tensor none(const Tensor& like) { return at::empty({0}, like.options()); }

// Calls f with k as a compile-time constant; larger kernels with 0
template <typename F> void with_kernel_size(int64_t k, F f) {
  switch (k) {
    case 1: return f(std::integral_constant<int, 1>());
    case 3: return f(std::integral_constant<int, 3>());
    case 5: return f(std::integral_constant<int, 5>());
    case 7: return f(std::integral_constant<int, 7>());
    case 9: return f(std::integral_constant<int, 9>());
    default: return f(std::integral_constant<int, 0>());
  }
}

}  // namespace medsegr
