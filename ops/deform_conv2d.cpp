// deform_conv2d on the CPU: y[m,c,p] = sum_n weight[m,n] * x[m,c, p + p_n + offset[m,n,p]], see reference.py.
//
// Offsets that are shared over space and small make an ordinary convolution with a slightly larger kernel, which
// dynamic_conv2d does best. Otherwise LANES channels are transposed so that the channels of a pixel are one register:
// where a tap reads and with which bilinear weights is the same for all channels, so it is worked out once per target,
// and each of the four pixels of a tap is then one load and one multiplication.
#include "cpu.h"
#include <cmath>
#include <torch/library.h>

namespace medsegr {
namespace {

constexpr int64_t LARGEST_REACH = 4;  // of the kernels that dynamic_conv2d has compiled, 9 x 9

// Taps at rows and columns relative to p: offset [M,2kk,1,1] + the k x k grid -> [M,kk,2] in double
template <typename T> std::vector<double> shared_taps(const T* offset, int64_t M, int64_t k) {
  std::vector<double> taps(M * k * k * 2);
  for (size_t i = 0; i < taps.size(); ++i) {
    const int64_t n = i / 2 % (k * k);
    taps[i] = double(offset[i]) + (i % 2 ? n % k : n / k) - k / 2;
  }
  return taps;
}

// The K x K kernel of ordinary convolution that equals the taps: a bilinear read at a fixed displacement is four
// weighted reads of whole pixels. Calls f(m, n, wy[2], wx[2], at): tap n gives wy[a] * wx[b] of its weight to the
// element at + a * K + b of kernel m.
template <typename F> void each_tap(const std::vector<double>& taps, int64_t M, int64_t kk, int64_t reach, F f) {
  for (int64_t i = 0; i < M * kk; ++i) {
    const double y = taps[2 * i], x = taps[2 * i + 1], y0 = std::floor(y), x0 = std::floor(x);
    const double wy[2] = {y0 + 1 - y, y - y0}, wx[2] = {x0 + 1 - x, x - x0};
    f(i / kk, i, wy, wx, (int64_t(y0) + reach) * (2 * reach + 1) + int64_t(x0) + reach);
  }
}

// How far taps read, in whole pixels; 0: too far for a kernel (or not a number)
int64_t reach_of(const std::vector<double>& taps) {
  double most = 0;
  for (double t : taps) {
    if (!(std::abs(t) < LARGEST_REACH)) return 0;
    most = std::max(most, std::abs(t));
  }
  return int64_t(most) + 1;
}

Tensor dense_kernel(const std::vector<double>& taps, const Tensor& weight, int64_t reach) {
  const int64_t M = weight.size(0), kk = weight.size(1) * weight.size(2), K = 2 * reach + 1;
  const Tensor dense = at::zeros({M, K, K}, weight.options());
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "deform_conv2d", [&] {
    scalar_t* to = dense.mutable_data_ptr<scalar_t>();
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    each_tap(taps, M, kk, reach, [&](int64_t m, int64_t i, const double* wy, const double* wx, int64_t at) {
      for (int ab = 0; ab < 4; ++ab) to[m * K * K + at + ab / 2 * K + ab % 2] += w[i] * wy[ab / 2] * wx[ab % 2];
    });
  });
  return dense;
}

// The gradient of dense_kernel -> offset's [M,2kk,1,1] and weight's [M,k,k]
std::pair<Tensor, Tensor> dense_kernel_backward(const std::vector<double>& taps, const Tensor& weight, int64_t reach,
                                                const Tensor& grad) {
  const int64_t M = weight.size(0), kk = weight.size(1) * weight.size(2), K = 2 * reach + 1;
  const Tensor to_offset = at::empty({M, 2 * kk, 1, 1}, weight.options()), to_weight = at::empty_like(weight);
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "deform_conv2d", [&] {
    const scalar_t *w = weight.const_data_ptr<scalar_t>(), *g = grad.const_data_ptr<scalar_t>();
    each_tap(taps, M, kk, reach, [&](int64_t m, int64_t i, const double* wy, const double* wx, int64_t at) {
      const scalar_t* top = g + m * K * K + at;
      const scalar_t* low = top + K;
      to_weight.mutable_data_ptr<scalar_t>()[i] =
          wy[0] * (wx[0] * top[0] + wx[1] * top[1]) + wy[1] * (wx[0] * low[0] + wx[1] * low[1]);
      scalar_t* out = to_offset.mutable_data_ptr<scalar_t>() + 2 * i;
      out[0] = w[i] * (wx[0] * (low[0] - top[0]) + wx[1] * (low[1] - top[1]));
      out[1] = w[i] * (wy[0] * (top[1] - top[0]) + wy[1] * (low[1] - low[0]));
    });
  });
  return {to_offset, to_weight};
}

// -------------------------------------------------------------------------------------------------------------------
// Offsets of their own at each pixel

// Pixels of a block of channels, LANES numbers each: the image with a ring of zeros, then two rows of zeros for reads
// that are wholly outside.
struct Block {
  int64_t H, W, stride;
  Block(int64_t H, int64_t W) : H(H), W(W), stride(W + 2) { TORCH_CHECK((H + 4) * stride < INT32_MAX, "too large"); }
  int64_t size() const { return (H + 4) * stride; }
  int64_t outside() const { return (H + 2) * stride; }
};

// `lanes` planes [H,W] -> the inside of a block (ring = 1) or [H*W] pixels (ring = 0)
template <typename T, typename scalar_t>
void transpose_in(const scalar_t* planes, int64_t lanes, int64_t H, int64_t W, T* to, int64_t ring) {
  for (int64_t y = 0; y < H; ++y) {
    T* row = to + ((y + ring) * (W + 2 * ring) + ring) * LANES<T>;
    for (int64_t l = 0; l < lanes; ++l)
      for (int64_t x = 0; x < W; ++x) row[x * LANES<T> + l] = static_cast<T>(planes[(l * H + y) * W + x]);
  }
}

template <typename T, typename scalar_t>
void transpose_out(const T* from, int64_t lanes, int64_t H, int64_t W, scalar_t* planes, int64_t ring) {
  for (int64_t y = 0; y < H; ++y) {
    const T* row = from + ((y + ring) * (W + 2 * ring) + ring) * LANES<T>;
    for (int64_t l = 0; l < lanes; ++l)
      for (int64_t x = 0; x < W; ++x) planes[(l * H + y) * W + x] = static_cast<scalar_t>(row[x * LANES<T> + l]);
  }
}

// Where each tap reads: its upper left pixel in the block, and how far below and right of that, each [kk,H*W].
template <typename T> struct Taps {
  std::vector<int32_t> at;
  std::vector<T> fy, fx;
  explicit Taps(int64_t n) : at(n), fy(n), fx(n) {}
};

// offset [2kk,H|1,W|1] of one target -> taps
template <typename T>
void find_taps(const Block& s, const T* offset, bool shared, int64_t k, Taps<T>& taps) {
  const int64_t HW = s.H * s.W, kk = k * k, size = shared ? 1 : HW;
  for (int64_t n = 0; n < kk; ++n)
    for (int64_t i = 0; i < s.H; ++i)
      for (int64_t j = 0; j < s.W; ++j) {
        const int64_t p = i * s.W + j, to = n * HW + p, from = 2 * n * size + (shared ? 0 : p);
        const T y = T(i + n / k - k / 2) + offset[from], x = T(j + n % k - k / 2) + offset[from + size];
        const T y0 = std::floor(y), x0 = std::floor(x);
        const bool inside = y0 >= -1 && y0 < s.H && x0 >= -1 && x0 < s.W;  // false for NaN, which fy and fx pass on
        const int32_t row = inside ? y0 : T(0), column = inside ? x0 : T(0);
        taps.at[to] = inside ? int32_t((row + 1) * s.stride + column + 1) : int32_t(s.outside());
        taps.fy[to] = y - y0;
        taps.fx[to] = x - x0;
      }
}

template <typename T> struct Corners {  // the four pixels of a tap, and their means on its upper and lower row
  Vec<T> v00, v01, v10, v11, top, low;
  Corners(const T* x, int64_t stride, T fx)
      : v00(load(x)), v01(load(x + LANES<T>)), v10(load(x + stride * LANES<T>)),
        v11(load(x + (stride + 1) * LANES<T>)), top(v00 + (v01 - v00) * fx), low(v10 + (v11 - v10) * fx) {}
};

// Targets and shares of their channels go to the threads; the number of shares does not depend on that of threads.
int64_t shares(int64_t M, int64_t C, int64_t lanes) {
  return std::min<int64_t>(std::max<int64_t>(1, 16 / M), (C + lanes - 1) / lanes);
}

template <typename scalar_t, typename T, typename F>
void each_block(int64_t M, int64_t C, const Block& s, const T* offset, bool shared, int64_t k, F f) {
  const int64_t parts = shares(M, C, LANES<T>), blocks = (C + LANES<T> - 1) / LANES<T>, kk = k * k;
  at::parallel_for(0, M * parts, 1, [&](int64_t begin, int64_t end) {
    Taps<T> taps(s.H * s.W * kk);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m = task / parts, part = task % parts;
      find_taps(s, offset + m * 2 * kk * (shared ? 1 : s.H * s.W), shared, k, taps);
      f(m, part, taps, part * blocks / parts, (part + 1) * blocks / parts);
    }
  });
}

template <typename scalar_t, typename T = typename Sum<scalar_t>::type>
void forward(const Block& s, int64_t M, int64_t C, int64_t k, const scalar_t* x, const T* offset, bool shared,
             const T* weight, scalar_t* y) {
  const int64_t HW = s.H * s.W, kk = k * k;
  each_block<scalar_t>(M, C, s, offset, shared, k,
                       [&](int64_t m, int64_t, const Taps<T>& taps, int64_t b, int64_t end) {
    std::vector<T> in(s.size() * LANES<T>), out(HW * LANES<T>);
    for (; b < end; ++b) {
      const int64_t first = m * C + b * LANES<T>, lanes = std::min<int64_t>(LANES<T>, C - b * LANES<T>);
      transpose_in(x + first * HW, lanes, s.H, s.W, in.data(), 1);
      for (int64_t p = 0; p < HW; ++p) {
        Vec<T> acc{};
        for (int64_t n = 0; n < kk; ++n) {
          const int64_t i = n * HW + p;
          const Corners<T> v(&in[taps.at[i] * LANES<T>], s.stride, taps.fx[i]);
          acc += (v.top + (v.low - v.top) * taps.fy[i]) * weight[m * kk + n];
        }
        store(&out[p * LANES<T>], acc);
      }
      transpose_out(out.data(), lanes, s.H, s.W, y + first * HW, 0);
    }
  });
}

// grad_offset [parts,M,2kk,H,W] and grad_weight [parts,M,kk] are summed over the shares of channels afterwards; a null
// pointer is not asked for.
template <typename scalar_t, typename T = typename Sum<scalar_t>::type>
void backward(const Block& s, int64_t M, int64_t C, int64_t k, const scalar_t* grad, const scalar_t* x,
              const T* offset, bool shared, const T* weight, scalar_t* grad_x, T* grad_offset, T* grad_weight) {
  const int64_t HW = s.H * s.W, kk = k * k;
  each_block<scalar_t>(M, C, s, offset, shared, k,
                       [&](int64_t m, int64_t part, const Taps<T>& taps, int64_t b, int64_t end) {
    std::vector<T> in(s.size() * LANES<T>), g(HW * LANES<T>), back(grad_x ? in.size() : 0), acc(kk * LANES<T>);
    T* to_offset = grad_offset ? grad_offset + (part * M + m) * 2 * kk * HW : nullptr;
    for (; b < end; ++b) {
      const int64_t first = m * C + b * LANES<T>, lanes = std::min<int64_t>(LANES<T>, C - b * LANES<T>);
      if (lanes < LANES<T>) std::fill(in.begin(), in.end(), T(0)), std::fill(g.begin(), g.end(), T(0));
      transpose_in(x + first * HW, lanes, s.H, s.W, in.data(), 1);
      transpose_in(grad + first * HW, lanes, s.H, s.W, g.data(), 0);
      std::fill(back.begin(), back.end(), T(0));
      for (int64_t p = 0; p < HW; ++p)
        for (int64_t n = 0; n < kk; ++n) {
          const Vec<T> here = load(&g[p * LANES<T>]);
          const T w = weight[m * kk + n], fy = taps.fy[n * HW + p], fx = taps.fx[n * HW + p];
          const int64_t at = taps.at[n * HW + p] * LANES<T>;
          if (grad_x) {
            T* to = &back[at];
            const Vec<T> low = here * (w * fy), top = here * w - low;
            const int64_t below = s.stride * LANES<T>;
            store(to, load(to) + top - top * fx);
            store(to + LANES<T>, load(to + LANES<T>) + top * fx);
            store(to + below, load(to + below) + low - low * fx);
            store(to + below + LANES<T>, load(to + below + LANES<T>) + low * fx);
          }
          const Corners<T> v(&in[at], s.stride, fx);
          if (grad_weight)
            store(&acc[n * LANES<T>], load(&acc[n * LANES<T>]) + here * (v.top + (v.low - v.top) * fy));
          if (to_offset) {
            const Vec<T> across = (v.v01 - v.v00) * (1 - fy) + (v.v11 - v.v10) * fy;
            to_offset[2 * n * HW + p] += w * sum<T>(here * (v.low - v.top));
            to_offset[(2 * n + 1) * HW + p] += w * sum<T>(here * across);
          }
        }
      if (grad_x) transpose_out(back.data(), lanes, s.H, s.W, grad_x + first * HW, 1);
    }
    if (grad_weight)
      for (int64_t n = 0; n < kk; ++n) grad_weight[(part * M + m) * kk + n] = sum<T>(load(&acc[n * LANES<T>]));
  });
}

bool is_shared(const Tensor& offset) { return offset.size(2) == 1 && offset.size(3) == 1; }

// taps and reach of offsets that an ordinary convolution can take; reach 0: it cannot
std::pair<std::vector<double>, int64_t> as_convolution(const Tensor& offset, int64_t k) {
  std::vector<double> taps;
  if (!is_shared(offset)) return {taps, 0};
  AT_DISPATCH_FLOATING_TYPES(offset.scalar_type(), "deform_conv2d",
                             [&] { taps = shared_taps(offset.const_data_ptr<scalar_t>(), offset.size(0), k); });
  return {taps, reach_of(taps)};
}

}  // namespace

Tensor deform_conv2d(const Tensor& x_, const Tensor& offset_, const Tensor& weight_) {
  const Tensor x = planes(x_), offset = offset_.contiguous(), weight = weight_.contiguous();
  const int64_t M = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), k = weight.size(2);
  if (x.numel() == 0) return at::empty_like(x);
  const auto [taps, reach] = as_convolution(offset, k);
  if (reach) return dynamic_conv2d(x, dense_kernel(taps, weight, reach), std::nullopt, std::nullopt);
  const Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "deform_conv2d", [&] {
    using T = typename Sum<scalar_t>::type;
    forward(Block(H, W), M, C, k, x.const_data_ptr<scalar_t>(), offset.const_data_ptr<T>(), is_shared(offset),
            weight.const_data_ptr<T>(), y.mutable_data_ptr<scalar_t>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> deform_conv2d_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& offset_, const Tensor& weight_, bool need_x,
    bool need_offset, bool need_weight) {
  const Tensor grad = planes(grad_), x = planes(x_);
  const Tensor offset = offset_.contiguous(), weight = weight_.contiguous();
  const int64_t M = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), k = weight.size(2);
  if (x.numel() == 0)
    return {need_x ? at::zeros_like(x) : none(weight), need_offset ? at::zeros_like(offset) : none(weight),
            need_weight ? at::zeros_like(weight) : none(weight)};
  const auto [taps, reach] = as_convolution(offset, k);
  if (reach) {
    const bool kernel = need_offset || need_weight;
    const auto [grad_x, grad_dense, unused] = dynamic_conv2d_backward(
        grad, x, dense_kernel(taps, weight, reach), std::nullopt, std::nullopt, need_x, kernel, false);
    if (!kernel) return {grad_x, none(weight), none(weight)};
    const auto [to_offset, to_weight] = dense_kernel_backward(taps, weight, reach, grad_dense);
    return {grad_x, need_offset ? to_offset : none(weight), need_weight ? to_weight : none(weight)};
  }
  const Tensor grad_x = need_x ? at::empty_like(x) : none(weight);
  Tensor grad_offset, grad_weight;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "deform_conv2d_backward", [&] {
    using T = typename Sum<scalar_t>::type;
    const int64_t parts = shares(M, C, LANES<T>);
    if (need_offset) grad_offset = at::zeros({parts, M, 2 * k * k, H, W}, weight.options());
    if (need_weight) grad_weight = at::zeros({parts, M, k, k}, weight.options());
    backward(Block(H, W), M, C, k, grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
             offset.const_data_ptr<T>(), is_shared(offset), weight.const_data_ptr<T>(),
             need_x ? grad_x.mutable_data_ptr<scalar_t>() : nullptr,
             need_offset ? grad_offset.mutable_data_ptr<T>() : nullptr,
             need_weight ? grad_weight.mutable_data_ptr<T>() : nullptr);
  });
  return {grad_x, need_offset ? grad_offset.sum(0).sum_to_size(offset.sizes()) : none(weight),
          need_weight ? grad_weight.sum(0) : none(weight)};
}

TORCH_LIBRARY_IMPL(medsegr, CPU, m) {
  m.impl("deform_conv2d", deform_conv2d);
  m.impl("deform_conv2d_backward", deform_conv2d_backward);
}

}  // namespace medsegr
