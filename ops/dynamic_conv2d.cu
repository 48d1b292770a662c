// dynamic_conv2d with CUDA: y[m,c] = conv(gate[m] * x[index[m],c], weight[m]), see reference.py.
//
// cuda.h explains tiles and strips. All sums are made in an order that does not depend on chance: what different blocks
// contribute to a number is written down separately and added up afterwards.
#include "cuda.h"

namespace medsegr {
namespace {

template <typename scalar_t> struct Operands {
  using T = typename Sum<scalar_t>::type;
  const scalar_t *x, *grad;  // [B,C,H,W] and, in the backward pass, [M,C,H,W]
  const T *weight, *gate;    // [M,k,k], and [M,H,W] or null: all ones
  const int64_t* index;      // [M] or null: target m reads image m
  int64_t B, M, HW;
  int k;

  __device__ int64_t image(int64_t m) const {
    const int64_t b = index ? index[m] : m;
    CUDA_KERNEL_ASSERT(b >= 0 && b < B);
    return b;
  }
  __device__ const T* gate_of(int64_t m) const { return gate ? gate + m * HW : nullptr; }

  // weight[m] -> shared memory, column by column as convolve takes it; flipped for the transposed convolution
  __device__ void load_weight(int64_t m, bool flip, T* to) const {
    const int rows = column_rows(k), kk = k * k;
    for (int s = threadIdx.x; s < k * rows; s += blockDim.x) {
      const int i = s % rows, at = i * k + s / rows;
      to[s] = i < k ? weight[m * kk + (flip ? kk - 1 - at : at)] : T(0);
    }
  }
};

// y [M,C,H,W]; a block has one group of planes of one target
template <int K, typename scalar_t, typename T = typename Sum<scalar_t>::type>
__global__ void __launch_bounds__(THREADS, 3) forward(Tile t, Operands<scalar_t> o, scalar_t* y) {
  T* weight = shared_memory<T>();
  T* tile = weight + t.front;
  const Place p(t, t.groups);
  const int c = p.share * t.planes, planes = min(t.planes, t.C - c);
  const scalar_t* from = o.x + (o.image(p.m) * t.C + c) * t.HW;
  o.load_weight(p.m, false, weight);
  clear(t, tile);
  fill(t, p, planes, from, o.gate_of(p.m), tile);
  if (!p.busy(t, planes)) return;
  T acc[R] = {};
  convolve<K>(acc, tile + p.at, t.height, o.k, weight);
  scalar_t* to = y + (p.m * t.C + c) * t.HW;
  each_row(t, p, [&](int r, unsigned, unsigned at) { to[at] = static_cast<scalar_t>(acc[r]); });
}

// The strip's part in the gradient of gate * x: the transposed convolution of planes of grad
template <int K, typename scalar_t, typename T>
__device__ __forceinline__ void transposed(const Tile& t, const Place& p, int planes, const scalar_t* grad, int k,
                                           const T* flipped, T* tile, T (&acc)[R]) {
  __syncthreads();  // what was in the tile has been used
  fill(t, p, planes, grad, static_cast<const T*>(nullptr), tile);
#pragma unroll
  for (int r = 0; r < R; ++r) acc[r] = 0;
  if (p.busy(t, planes)) convolve<K>(acc, tile + p.at, t.height, k, flipped);
}

// grad_x [B,C,H,W]; a block has one group of planes of one image, and adds up what its targets contribute
template <int K, typename scalar_t, typename T = typename Sum<scalar_t>::type>
__global__ void __launch_bounds__(THREADS, 3) backward_x(Tile t, Operands<scalar_t> o, scalar_t* grad_x) {
  T* weight = shared_memory<T>();
  T* tile = weight + t.front;
  const Place p(t, t.groups);
  const int b = p.m, begin = o.index ? 0 : b, end = o.index ? o.M : b + 1;
  const int c = p.share * t.planes, planes = min(t.planes, t.C - c);
  T total[R] = {}, acc[R];
  clear(t, tile);
  for (int m = begin; m < end; ++m) {
    if (o.image(m) != b) continue;
    __syncthreads();  // the weights of the target before have been used
    o.load_weight(m, true, weight);
    transposed<K>(t, p, planes, o.grad + (static_cast<int64_t>(m) * t.C + c) * t.HW, o.k, weight, tile, acc);
    if (!p.busy(t, planes)) continue;
    const T* gate = o.gate_of(m);
    if (gate) each_row<true>(t, p, [&](int r, unsigned pixel, unsigned) { acc[r] *= gate[pixel]; });
#pragma unroll
    for (int r = 0; r < R; ++r) total[r] += acc[r];
  }
  if (!p.busy(t, planes)) return;
  scalar_t* to = grad_x + (p.m * t.C + c) * t.HW;
  each_row(t, p, [&](int r, unsigned, unsigned at) { to[at] = static_cast<scalar_t>(total[r]); });
}

// partial [chunks,M,H,W], to be summed: grad_gate = sum_c x * (gradient of gate * x); a block has a chunk of the groups
template <int K, typename scalar_t, typename T = typename Sum<scalar_t>::type>
__global__ void __launch_bounds__(THREADS, 2) backward_gate(Tile t, Operands<scalar_t> o, T* partial) {
  T* weight = shared_memory<T>();
  T* tile = weight + t.front;
  const Place p(t, t.chunks);
  const int64_t step = t.planes * t.HW;
  const scalar_t* x = o.x + (o.image(p.m) * t.C + p.first(t)) * t.HW;
  const scalar_t* grad = o.grad + (p.m * t.C + p.first(t)) * t.HW;
  T total[R] = {}, acc[R];
  o.load_weight(p.m, true, weight);
  clear(t, tile);
  for (int c = p.first(t); c < p.last(t); c += t.planes, x += step, grad += step) {
    const int planes = min(t.planes, p.last(t) - c);
    transposed<K>(t, p, planes, grad, o.k, weight, tile, acc);
    if (p.busy(t, planes))
      each_row(t, p, [&](int r, unsigned, unsigned at) { total[r] += acc[r] * static_cast<T>(x[at]); });
  }
  // add up the planes of the group, which different threads hold
  __syncthreads();
  if (p.plane < t.planes)
#pragma unroll
    for (int r = 0; r < R; ++r) tile[p.at + r] = total[r];
  __syncthreads();
  T* to = partial + (p.share * o.M + p.m) * t.HW;
  for (int i = threadIdx.x; i < t.rows * t.cols; i += blockDim.x) {
    const int row = i / t.cols, col = i % t.cols, y = p.top + row, x_ = p.left + col;
    if (y >= t.H || x_ >= t.W) continue;
    T sum = 0;
    for (int plane = 0; plane < t.planes; ++plane) sum += tile[plane * t.plane + col * t.height + row];
    to[y * t.W + x_] = sum;
  }
}

// partial [chunks * tiles,M,k,k], to be summed: grad_weight[i,j] = sum_cp (gate * x)[c,p + (i,j)] * grad[c,p]. The
// k x k sums are registers of every thread; 9 x 9 takes three passes, each for three columns, and larger kernels one for
// every 8 rows of a column, since more sums than these would not fit.
template <int K, typename scalar_t, typename T = typename Sum<scalar_t>::type>
__global__ void __launch_bounds__(THREADS, 2) backward_weight(Tile t, Operands<scalar_t> o, T* partial) {
  constexpr int N = K ? K : 8, COLS = K == 9 ? 3 : K ? K : 1;
  T* tile = shared_memory<T>();
  const Place p(t, t.chunks);
  const scalar_t* x = o.x + (o.image(p.m) * t.C + p.first(t)) * t.HW;
  const scalar_t* grad = o.grad + (p.m * t.C + p.first(t)) * t.HW;
  T* to = partial + (p.part(t) * o.M + p.m) * o.k * o.k;
  for (int j = 0; j < o.k; j += COLS)
    for (int i = 0; i < o.k; i += N) {
      T sums[COLS * N] = {};
      __syncthreads();  // the sums before have been written
      kernel_sums<N, COLS>(t, p, x, o.gate_of(p.m), grad, tile, j * t.height + i, sums);
#pragma unroll
      for (int col = 0; col < COLS; ++col)
        block_sums<N>(sums + col * N, tile, min(N, o.k - i), to + i * o.k + j + col, o.k);
    }
}

// Contiguous arguments whose shapes have been checked
struct Arguments {
  Tensor x, weight, gate, index, grad;
  int64_t B, C, H, W, M, k;

  Arguments(const Tensor& x_, const Tensor& weight_, const Optional& gate_, const Optional& index_)
      : x(x_.contiguous()), weight(weight_.contiguous()) {
    check_dtype(x);
    TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 3 && weight.size(1) == weight.size(2) && weight.size(2) % 2 == 1,
                      "dynamic_conv2d: x must be [B,C,H,W] and weight [M,k,k], k odd");
    B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), M = weight.size(0), k = weight.size(2);
    if (gate_) gate = gate_->contiguous();
    if (index_) index = index_->contiguous();
    TORCH_CHECK_VALUE(!gate_ || gate.sizes() == at::IntArrayRef({M, H, W}), "dynamic_conv2d: gate must be [M,H,W]");
    TORCH_CHECK_VALUE(index_ ? index.scalar_type() == at::kLong && index.sizes() == at::IntArrayRef({M}) : M == B,
                      "dynamic_conv2d: M kernels need an int64 index [M], or as many images");
    TORCH_CHECK_INDEX(M == 0 || B > 0, "dynamic_conv2d: there are no images");
    TORCH_CHECK_VALUE(M <= INT_MAX, "dynamic_conv2d: too many targets");
    for (const Tensor& other : {weight, gate, index})
      TORCH_CHECK(!other.defined() || other.device() == x.device(), "dynamic_conv2d: arguments on several devices");
  }
  template <typename scalar_t, typename T = typename Sum<scalar_t>::type> Operands<scalar_t> operands() const {
    return {x.const_data_ptr<scalar_t>(), grad.defined() ? grad.const_data_ptr<scalar_t>() : nullptr,
            weight.const_data_ptr<T>(), gate.defined() ? gate.const_data_ptr<T>() : nullptr,
            index.defined() ? index.const_data_ptr<int64_t>() : nullptr, B, M, H * W, static_cast<int>(k)};
  }
  Tile tile(int64_t targets) const {
    return Tile(targets, C, H, W, k, k * column_rows(k), weight.element_size());
  }
};

Tensor dynamic_conv2d(const Tensor& x, const Tensor& weight, const Optional& gate, const Optional& index) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Arguments a(x, weight, gate, index);
  Tensor y = at::empty({a.M, a.C, a.H, a.W}, x.options());
  if (y.numel() == 0) return y;
  MEDSEGR_DISPATCH(x.scalar_type(), "dynamic_conv2d", [&] {
    with_kernel_size(a.k, [&](auto K) {
      const Tile t = a.tile(a.M);
      launch("dynamic_conv2d", forward<K(), scalar_t>, t.grid(a.M, t.groups), t.threads, t.shared, t,
             a.operands<scalar_t>(), y.mutable_data_ptr<scalar_t>());
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> dynamic_conv2d_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Optional& gate, const Optional& index, bool need_x,
    bool need_weight, bool need_gate) {
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments a(x, weight, gate, index);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({a.M, a.C, a.H, a.W}) && grad.options().type_equal(x.options()),
                    "dynamic_conv2d: grad unlike the output");
  a.grad = grad.contiguous();
  const auto wide = weight.options();
  const Tensor grad_x = at::empty(need_x ? x.sizes() : 0, x.options());
  if (grad.numel() == 0) grad_x.zero_();
  Tensor weights = parts_of(a.weight, 0), gates = at::empty({0, a.M, a.H, a.W}, wide);
  if (grad.numel() > 0) MEDSEGR_DISPATCH(x.scalar_type(), "dynamic_conv2d_backward", [&] {
    using T = typename Sum<scalar_t>::type;
    const auto o = a.operands<scalar_t>();
    with_kernel_size(a.k, [&](auto K) {
      if (need_x) {
        const Tile t = a.tile(a.B);
        launch("dynamic_conv2d_backward x", backward_x<K(), scalar_t>, t.grid(a.B, t.groups), t.threads, t.shared, t, o,
               grad_x.mutable_data_ptr<scalar_t>());
      }
      const Tile t = a.tile(a.M);
      const dim3 grid = t.grid(a.M, t.chunks);
      if (need_weight) {
        weights = parts_of(a.weight, t.chunks * t.tiles());
        launch("dynamic_conv2d_backward weight", backward_weight<K(), scalar_t>, grid, t.threads, t.shared, t, o,
               weights.mutable_data_ptr<T>());
      }
      if (need_gate) {
        gates = at::empty({t.chunks, a.M, a.H, a.W}, wide);
        launch("dynamic_conv2d_backward gate", backward_gate<K(), scalar_t>, grid, t.threads, t.shared, t, o,
               gates.mutable_data_ptr<T>());
      }
    });
  });
  return {grad_x, need_weight ? weights.sum(0) : none(weight), need_gate ? gates.sum(0) : none(weight)};
}

TORCH_LIBRARY_IMPL(MEDSEGR_LIBRARY, MEDSEGR_KEY, m) {
  m.impl("dynamic_conv2d", dynamic_conv2d);
  m.impl("dynamic_conv2d_backward", dynamic_conv2d_backward);
}

}  // namespace
}  // namespace medsegr
