// dynamic_conv2d on the CPU: y[m,c] = conv(gate[m] * x[index[m],c], weight[m]), see reference.py.
//
// A plane (one channel of one image) is copied, gated and zero-padded, into a scratch buffer that stays in the cache.
// Its rows are convolved LANES numbers at a time, a strip of ROWS output rows at once, so that each register read from
// the scratch serves up to k of them. Meanwhile the same strip of the next plane is fetched from memory.
#include "cpu.h"
#include <torch/library.h>

namespace medsegr {
namespace {

constexpr int ROWS = 8;

// The size of a padded plane: k / 2 zeros around it, and on the right and below as many as whole registers and strips
// need, so that no loop has to look where it is.
template <typename T> struct Plane {
  int64_t H, W, k, pad, stride, rows;
  Plane(int64_t H, int64_t W, int64_t k)
      : H(H), W(W), k(k), pad(k / 2), stride(round_up(W, LANES<T>) + k - 1), rows(round_up(H, ROWS) + k - 1) {}
  int64_t padded() const { return rows * stride + LANES<T>; }
  int64_t flat() const { return round_up(H, ROWS) * W + LANES<T>; }  // [H,W], and room for what is written beyond it
  bool whole() const { return H % ROWS == 0 && W % LANES<T> == 0; }  // nothing is written beyond it
};

// src [H,W] (times gate [H,W]) -> the inside of a padded plane, whose borders stay zero; `flat` is scratch
template <typename T, typename scalar_t>
void fill(const Plane<T>& s, T* plane, const scalar_t* src, const T* gate, T* flat) {
  const T* from = flat;
  if constexpr (std::is_same_v<T, scalar_t>)
    if (!gate && s.whole()) from = src;
  if (from == flat)
    for (int64_t i = 0; i < s.H * s.W; ++i) flat[i] = static_cast<T>(src[i]) * (gate ? gate[i] : T(1));
  for (int64_t y = 0; y < s.H; ++y) {
    T* row = plane + (y + s.pad) * s.stride + s.pad;
    for (int64_t x = 0; x < s.W; x += LANES<T>) store(row + x, load(from + y * s.W + x));
    store(row + s.W, Vec<T>{});  // the rest of the last register; what this reaches of the next row is still to come
  }
}

// padded plane, weight [k,k] -> out [H,W]: out[y,x] = sum_ij plane[y+i,x+j] * weight[i,j]. K = k, or 0 if that is not
// known when compiling. From right to left and downwards, since a row's last register reaches into the next row.
// next [H,W]: what is to be fetched from memory.
template <int K, typename T, typename scalar_t>
void convolve(const Plane<T>& s, const T* plane, const T* weight, T* out, const scalar_t* next) {
  const int k = K ? K : s.k;
  for (int64_t y = 0; y < s.H; y += ROWS)
    for (int64_t x = round_up(s.W, LANES<T>) - LANES<T>; x >= 0; x -= LANES<T>) {
      for (int o = 0; o < ROWS; ++o) __builtin_prefetch(next + (y + o) * s.W + x);
      Vec<T> acc[ROWS] = {};
      for (int j = 0; j < k; ++j) {
        const T* column = plane + y * s.stride + x + j;
        if constexpr (K > 0) {
          Vec<T> w[K];
#pragma GCC unroll 16
          for (int i = 0; i < K; ++i) w[i] = Vec<T>{} + weight[i * K + j];
#pragma GCC unroll 32
          for (int r = 0; r < ROWS + K - 1; ++r) {
            const Vec<T> v = load(column + r * s.stride);
#pragma GCC unroll 16
            for (int o = 0; o < ROWS; ++o)
              if (r >= o && r - o < K) acc[o] += v * w[r - o];
          }
        } else {
          for (int i = 0; i < k; ++i)
            for (int o = 0; o < ROWS; ++o) acc[o] += load(column + (i + o) * s.stride) * weight[i * k + j];
        }
      }
      for (int o = 0; o < ROWS; ++o) store(out + (y + o) * s.W + x, acc[o]);
    }
}

// padded planes of the input and of the output's gradient -> acc[i,j] += sum_yx plane[y+i,x+j] * grad[y,x], where
// each of the k x k sums is still a register of LANES numbers
template <int K, typename T>
void correlate(const Plane<T>& s, const T* plane, const T* grad, T* acc) {
  const int k = K ? K : s.k;
  for (int64_t y = 0; y < s.H; y += ROWS)
    for (int64_t x = 0; x < s.W; x += LANES<T>) {
      Vec<T> g[ROWS];
      for (int o = 0; o < ROWS; ++o) g[o] = load(grad + (y + o + s.pad) * s.stride + s.pad + x);
      for (int j = 0; j < k; ++j) {
        const T* column = plane + y * s.stride + x + j;
        if constexpr (K > 0) {
          Vec<T> d[K];
#pragma GCC unroll 16
          for (int i = 0; i < K; ++i) d[i] = load(acc + (i * K + j) * LANES<T>);
#pragma GCC unroll 32
          for (int r = 0; r < ROWS + K - 1; ++r) {
            const Vec<T> v = load(column + r * s.stride);
#pragma GCC unroll 16
            for (int o = 0; o < ROWS; ++o)
              if (r >= o && r - o < K) d[r - o] += v * g[o];
          }
#pragma GCC unroll 16
          for (int i = 0; i < K; ++i) store(acc + (i * K + j) * LANES<T>, d[i]);
        } else {
          for (int i = 0; i < k; ++i) {
            T* d = acc + (i * k + j) * LANES<T>;
            for (int o = 0; o < ROWS; ++o) store(d, load(d) + load(column + (i + o) * s.stride) * g[o]);
          }
        }
      }
    }
}

template <int K, typename scalar_t, typename T>
void forward(const Plane<T>& s, int64_t M, int64_t C, const scalar_t* x, const T* weight, const T* gate,
             const int64_t* index, scalar_t* y) {
  const int64_t HW = s.H * s.W;
  at::parallel_for(0, M * C, std::max<int64_t>(1, GRAIN / (HW * s.k * s.k)), [&](int64_t begin, int64_t end) {
    std::vector<T> plane(s.padded()), flat(s.flat());
    for (int64_t mc = begin; mc < end; ++mc) {
      const int64_t m = mc / C, c = mc % C, b = index ? index[m] : m;
      const scalar_t* from = x + (b * C + c) * HW;
      fill(s, plane.data(), from, gate ? gate + m * HW : nullptr, flat.data());
      T* to = flat.data();
      if constexpr (std::is_same_v<T, scalar_t>)
        if (s.whole()) to = y + mc * HW;
      convolve<K>(s, plane.data(), weight + m * s.k * s.k, to, from + HW);
      if (to == flat.data())
        for (int64_t i = 0; i < HW; ++i) y[mc * HW + i] = static_cast<scalar_t>(to[i]);
    }
  });
}

// Channels are dealt out in `blocks` fixed shares, and a share runs through all targets: so nothing is written by two
// threads, and sums do not depend on how many threads there are. grad_weight [blocks,M,k,k] and grad_gate
// [blocks,M,H,W] are summed over the shares afterwards; a null pointer is not asked for.
template <int K, typename scalar_t, typename T>
void backward(const Plane<T>& s, int64_t M, int64_t C, int64_t blocks, const scalar_t* grad, const scalar_t* x,
              const T* weight, const T* gate, const int64_t* index, T* grad_x, T* grad_weight, T* grad_gate) {
  const int64_t HW = s.H * s.W, kk = s.k * s.k;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> plane(s.padded()), g(s.padded()), flat(s.flat());
    std::vector<T> flipped(kk), acc(kk * LANES<T>);
    for (int64_t block = begin; block < end; ++block)
      for (int64_t m = 0; m < M; ++m) {
        const int64_t b = index ? index[m] : m;
        const T* here = gate ? gate + m * HW : nullptr;
        for (int64_t i = 0; i < kk; ++i) flipped[i] = weight[(m + 1) * kk - 1 - i];
        std::fill(acc.begin(), acc.end(), T(0));
        T* gate_sum = grad_gate ? grad_gate + (block * M + m) * HW : nullptr;
        if (gate_sum) std::fill(gate_sum, gate_sum + HW, T(0));
        for (int64_t c = block * C / blocks; c < (block + 1) * C / blocks; ++c) {
          const scalar_t* from = x + (b * C + c) * HW;
          fill(s, g.data(), grad + (m * C + c) * HW, static_cast<const T*>(nullptr), flat.data());
          if (grad_weight) {
            fill(s, plane.data(), from, here, flat.data());
            correlate<K>(s, plane.data(), g.data(), acc.data());
          }
          if (!grad_x && !gate_sum) continue;
          // the gradient of gate * x
          convolve<K>(s, g.data(), flipped.data(), flat.data(), grad + (m * C + c + 1) * HW);
          if (gate_sum)
            for (int64_t i = 0; i < HW; ++i) gate_sum[i] += flat[i] * static_cast<T>(from[i]);
          if (T* to = grad_x ? grad_x + (b * C + c) * HW : nullptr)
            for (int64_t i = 0; i < HW; ++i) to[i] += here ? flat[i] * here[i] : flat[i];
        }
        if (grad_weight)
          for (int64_t i = 0; i < kk; ++i) grad_weight[(block * M + m) * kk + i] = sum<T>(load(&acc[i * LANES<T>]));
      }
  });
}

// index int64 [M] or None, made contiguous and checked
Tensor checked(const Optional& index, int64_t M, int64_t B) {
  if (!index) {
    TORCH_CHECK_VALUE(M == B, "dynamic_conv2d: M kernels need an int64 index [M], or as many images");
    return Tensor();
  }
  TORCH_CHECK_VALUE(index->scalar_type() == at::kLong && index->numel() == M,
                    "dynamic_conv2d: M kernels need an int64 index [M], or as many images");
  const Tensor i = index->contiguous();
  for (int64_t m = 0; m < M; ++m) {
    const int64_t b = i.const_data_ptr<int64_t>()[m];
    TORCH_CHECK_INDEX(b >= 0 && b < B, "dynamic_conv2d: index " + std::to_string(b) + " is not one of " +
                                           std::to_string(B) + " images");
  }
  return i;
}

}  // namespace

Tensor dynamic_conv2d(const Tensor& x_, const Tensor& weight_, const Optional& gate_, const Optional& index_) {
  const Tensor x = planes(x_), weight = weight_.contiguous(), gate = gate_ ? gate_->contiguous() : Tensor();
  const int64_t M = weight.size(0), C = x.size(1), H = x.size(2), W = x.size(3), k = weight.size(2);
  const Tensor index = checked(index_, M, x.size(0));
  Tensor y = at::empty({M, C, H, W}, x.options());
  if (y.numel() == 0) return y;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "dynamic_conv2d", [&] {
    using T = typename Sum<scalar_t>::type;
    const Plane<T> s(H, W, k);
    with_kernel_size(k, [&](auto K) {
      forward<K(), scalar_t>(s, M, C, x.const_data_ptr<scalar_t>(), weight.const_data_ptr<T>(),
                   gate.defined() ? gate.const_data_ptr<T>() : nullptr,
                   index.defined() ? index.const_data_ptr<int64_t>() : nullptr, y.mutable_data_ptr<scalar_t>());
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> dynamic_conv2d_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& weight_, const Optional& gate_, const Optional& index_,
    bool need_x, bool need_weight, bool need_gate) {
  const Tensor grad = planes(grad_), x = planes(x_), weight = weight_.contiguous();
  const Tensor gate = gate_ ? gate_->contiguous() : Tensor();
  const int64_t M = weight.size(0), C = x.size(1), H = x.size(2), W = x.size(3), k = weight.size(2);
  const Tensor index = checked(index_, M, x.size(0));
  const int64_t blocks = std::min<int64_t>(C, 32);
  const auto options = weight.options();
  Tensor grad_x = need_x ? at::zeros(x.sizes(), options) : Tensor();
  Tensor grad_weight = need_weight ? at::zeros({blocks, M, k, k}, options) : Tensor();
  Tensor grad_gate = need_gate ? at::zeros({blocks, M, H, W}, options) : Tensor();
  if (grad.numel() > 0)
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "dynamic_conv2d_backward", [&] {
      using T = typename Sum<scalar_t>::type;
      const Plane<T> s(H, W, k);
      const auto to = [](Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
      with_kernel_size(k, [&](auto K) {
        backward<K(), scalar_t>(s, M, C, blocks, grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
                      weight.const_data_ptr<T>(), gate.defined() ? gate.const_data_ptr<T>() : nullptr,
                      index.defined() ? index.const_data_ptr<int64_t>() : nullptr, to(grad_x), to(grad_weight),
                      to(grad_gate));
      });
    });
  return {need_x ? grad_x.to(x.scalar_type()) : none(weight), need_weight ? grad_weight.sum(0) : none(weight),
          need_gate ? grad_gate.sum(0) : none(weight)};
}

TORCH_LIBRARY_IMPL(medsegr, CPU, m) {
  m.impl("dynamic_conv2d", dynamic_conv2d);
  m.impl("dynamic_conv2d_backward", dynamic_conv2d_backward);
}

}  // namespace medsegr
