// deform_conv2d with CUDA: y[m,c,p] = sum_n weight[m,n] * x[m,c, p + p_n + offset[m,n,p]], see reference.py.
//
// Offsets shared over space: a bilinear read at a fixed displacement is four weighted reads of whole pixels, so the
// taps of a target make an ordinary kernel that is a little larger. Each block works it out, and convolves with it as
// dynamic_conv2d does (cuda.h). If taps read farther than REACH pixels, all are taken one by one, from global memory.
// Offsets of their own at each pixel: a thread has one pixel and several channels, for which the taps are the same.
#include "cuda.h"

namespace medsegr {
namespace {

constexpr int REACH = LARGEST / 2;
constexpr int DENSE = LARGEST * column_rows(LARGEST);  // numbers of the largest kernel that taps are made into
constexpr int PIXELS = 128, CHANNELS = 8;              // of a block, and of a thread, where each pixel has its offsets

// A tap reads pixels ab = 0 upper left, at (y, x) from the output, 1 upper right, 2 lower left and 3 lower right. fy
// and fx are the shares of the lower and of the right ones, NaN if the offset is not finite.
template <typename T> struct Tap {
  int y, x;
  T fy, fx, weight;
  __device__ T share(int ab) const { return (ab / 2 ? fy : 1 - fy) * (ab % 2 ? fx : 1 - fx); }
  // where pixel ab is in a plane [H,W] for the output at (row, col); -1: outside
  __device__ int at(int ab, int row, int col, int H, int W) const {
    const int i = row + y + ab / 2, j = col + x + ab % 2;
    return i >= 0 && i < H && j >= 0 && j < W ? i * W + j : -1;
  }
  // the gradients of the tap's offset (dx comes `step` after dy) and weight, from the sums of grad * pixel ab; at whole
  // pixels the slope is the one to the right, as in reference.py
  __device__ void write_gradient(const T (&sum)[4], T* offset, int64_t step, T& to_weight) const {
    const T top = sum[1] - sum[0], bottom = sum[3] - sum[2], left = sum[2] - sum[0], right = sum[3] - sum[1];
    offset[0] = weight * ((1 - fx) * left + fx * right), offset[step] = weight * ((1 - fy) * top + fy * bottom);
    to_weight = (1 - fy) * (sum[0] + fx * top) + fy * (sum[2] + fx * bottom);
  }
};

template <typename T, typename scalar_t> __device__ T pixel(const scalar_t* plane, int at) {
  const T v = static_cast<T>(plane[max(at, 0)]);  // without a branch, so that many reads wait for memory together
  return at < 0 ? T(0) : v;
}

// Tap n of a target: offset [2kk,...] with `step` numbers from one channel to the next, weight [k,k]
template <typename T> __device__ Tap<T> find_tap(const T* offset, int64_t step, const T* weight, int n, int k) {
  constexpr T MOST = 1 << 28;  // pixels, so that every number fits in an int; of NaN and a number, max is the number
  const T dy = offset[2 * n * step], dx = offset[(2 * n + 1) * step], y0 = floor(dy), x0 = floor(dx);
  const int y = min(max(y0, -MOST), MOST), x = min(max(x0, -MOST), MOST);
  return {n / k - k / 2 + y, n % k - k / 2 + x, dy - y0, dx - x0, weight[n]};
}

// Offsets shared over space, offset [M,2kk]: what a block has in shared memory. The taps of its target; the ordinary
// kernel that equals them, or the gradient of that kernel; the tile. Mirrored taps are those of the transposed
// operation, which reads at p - tap what the operation itself reads at p + tap.
template <typename T> struct Shared {
  T *dense, *tile;
  Tap<T>* taps;
  int kk, reach = 2;  // pixels; at least 2, since a 5 x 5 kernel is as fast as a 3 x 3 one
  __device__ Shared(const Tile& t, const T* offset, const T* weight, int64_t m, int k, bool mirrored) {
    dense = shared_memory<T>(), tile = dense + t.front, taps = reinterpret_cast<Tap<T>*>(dense + DENSE), kk = k * k;
    for (int n = threadIdx.x; n < kk; n += blockDim.x) {
      const Tap<T> tap = find_tap(offset + m * 2 * kk, 1, weight + m * kk, n, k);
      taps[n] = mirrored ? Tap<T>{-tap.y - 1, -tap.x - 1, 1 - tap.fy, 1 - tap.fx, tap.weight} : tap;
    }
    __syncthreads();
    for (int n = 0; n < kk; ++n)
      reach = max(reach, max(max(-taps[n].y, taps[n].y + 1), max(-taps[n].x, taps[n].x + 1)));
  }
  __device__ void make_dense() {  // column by column, as convolve takes it
    const int K = 2 * reach + 1, rows = column_rows(K);
    for (int s = threadIdx.x; s < K * rows; s += blockDim.x) {
      T sum = 0;
      for (int n = 0; n < kk; ++n) {
        const int a = s % rows - reach - taps[n].y, b = s / rows - reach - taps[n].x;
        if ((a == 0 || a == 1) && (b == 0 || b == 1)) sum += taps[n].weight * taps[n].share(2 * a + b);
      }
      dense[s] = sum;
    }
  }
};

// from -> to, both [M,C,H,W]: x -> y, or mirrored: grad -> grad_x. A block has one group of planes of one target.
template <typename scalar_t, typename T = typename Sum<scalar_t>::type>
__global__ void __launch_bounds__(THREADS, 3)
shared_forward(Tile t, int k, bool mirrored, const scalar_t* from, const T* offset, const T* weight, scalar_t* to) {
  const Place p(t, t.groups);
  Shared<T> s(t, offset, weight, p.m, k, mirrored);
  const int c = p.share * t.planes, planes = min(t.planes, t.C - c);
  from += (p.m * t.C + c) * t.HW, to += (p.m * t.C + c) * t.HW;
  if (s.reach <= REACH) {
    s.make_dense();
    clear(t, s.tile);
    fill(t, p, planes, from, static_cast<const T*>(nullptr), s.tile);
  }
  if (!p.busy(t, planes)) return;
  T acc[R] = {};
  const T* window = s.tile + p.at + (REACH - s.reach) * (t.height + 1);
  switch (s.reach) {
    case 2: convolve<5>(acc, window, t.height, 5, s.dense); break;
    case 3: convolve<7>(acc, window, t.height, 7, s.dense); break;
    case 4: convolve<9>(acc, window, t.height, 9, s.dense); break;
    default:
      from += p.plane * t.HW;
      for (int n = 0; n < s.kk; ++n)
        each_row(t, p, [&](int r, unsigned, unsigned) {
          const Tap<T> tap = s.taps[n];
          for (int ab = 0; ab < 4; ++ab)
            acc[r] += tap.weight * tap.share(ab) * pixel<T>(from, tap.at(ab, p.y + r, p.x, t.H, t.W));
        });
  }
  each_row(t, p, [&](int r, unsigned, unsigned at) { to[at] = static_cast<scalar_t>(acc[r]); });
}

// grad_offset [chunks * tiles,M,2kk] and grad_weight [chunks * tiles,M,kk], to be summed
template <typename scalar_t, typename T = typename Sum<scalar_t>::type>
__global__ void __launch_bounds__(THREADS, 2)
shared_backward(Tile t, int64_t M, int k, const scalar_t* x, const scalar_t* grad, const T* offset, const T* weight,
                T* grad_offset, T* grad_weight) {
  const Place p(t, t.chunks);
  Shared<T> s(t, offset, weight, p.m, k, false);
  const int64_t part = p.part(t) * M + p.m, start = (p.m * t.C + p.first(t)) * t.HW;
  x += start, grad += start, grad_offset += part * 2 * s.kk, grad_weight += part * s.kk;
  const auto near = [&](auto K) {  // the gradient of the ordinary kernel, and then of the taps
    T sums[K * K] = {};
    kernel_sums<K, K, scalar_t, T>(t, p, x, nullptr, grad, s.tile, (REACH - s.reach) * (t.height + 1), sums);
#pragma unroll
    for (int j = 0; j < K; ++j) block_sums<K>(sums + j * K, s.tile, K, s.dense + j * K, 1);
    __syncthreads();
    for (int n = threadIdx.x; n < s.kk; n += blockDim.x) {
      const T* at = s.dense + (s.taps[n].x + s.reach) * K + s.taps[n].y + s.reach;
      s.taps[n].write_gradient({at[0], at[K], at[1], at[K + 1]}, grad_offset + 2 * n, 1, grad_weight[n]);
    }
  };
  if (s.reach == 2) return near(std::integral_constant<int, 5>());
  if (s.reach == 3) return near(std::integral_constant<int, 7>());
  for (int n = 0; n < s.kk; ++n) {  // also for 9 x 9, whose 81 sums would be too many registers
    T sums[4] = {};
    for (int c = 0; c + p.first(t) < p.last(t); c += t.planes) {
      if (!p.busy(t, min(t.planes, p.last(t) - p.first(t) - c))) continue;
      each_row(t, p, [&](int r, unsigned, unsigned at) {
        const T g = static_cast<T>((grad + c * t.HW)[at]);
        for (int ab = 0; ab < 4; ++ab)
          sums[ab] += g * pixel<T>(x + (c + p.plane) * t.HW, s.taps[n].at(ab, p.y + r, p.x, t.H, t.W));
      });
    }
    T to_offset[2], to_weight;
    s.taps[n].write_gradient(sums, to_offset, 1, to_weight);
    block_sums<2>(to_offset, s.tile, 2, grad_offset + 2 * n, 1);
    block_sums<1>(&to_weight, s.tile, 1, grad_weight + n, 1);
  }
}

// Offsets of their own at each pixel, offset [M,2kk,H,W]. Blocks are [m, chunk of the channels, part of PIXELS pixels];
// a thread has the planes from first to last among all M * C, and the pixel at place.
template <typename T> struct Pixels {
  int64_t M, C, HW;
  int H, W, k, chunks, parts;
  const T *offset, *weight;
  __device__ int64_t first() const { return blockIdx.x * C + blockIdx.y * C / chunks; }
  __device__ int64_t last() const { return blockIdx.x * C + (blockIdx.y + 1) * C / chunks; }
  __device__ int place() const { return blockIdx.z * PIXELS + threadIdx.x; }
  __device__ Tap<T> tap(int n, int (&at)[4]) const {
    const int64_t m = blockIdx.x, kk = k * k;
    const Tap<T> tap = find_tap(offset + m * 2 * kk * HW + place(), HW, weight + m * kk, n, k);
    for (int ab = 0; ab < 4; ++ab) at[ab] = tap.at(ab, place() / W, place() % W, H, W);
    return tap;
  }
};

// y; chunks are of at most CHANNELS channels
template <typename scalar_t, typename T = typename Sum<scalar_t>::type>
__global__ void __launch_bounds__(PIXELS) pixel_forward(Pixels<T> s, const scalar_t* x, scalar_t* y) {
  if (s.place() >= s.HW) return;
  x += s.first() * s.HW, y += s.first() * s.HW + s.place();
  const int channels = s.last() - s.first();
  T acc[CHANNELS] = {};
  for (int n = 0; n < s.k * s.k; ++n) {
    int at[4];
    const Tap<T> tap = s.tap(n, at);
    for (int ab = 0; ab < 4; ++ab)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        acc[c] += tap.weight * tap.share(ab) * pixel<T>(x + min(c, channels - 1) * s.HW, at[ab]);
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c)
    if (c < channels) y[c * s.HW] = static_cast<scalar_t>(acc[c]);
}

// grad_offset [chunks,M,2kk,H,W] and grad_weight [chunks * parts,M,kk], to be summed; and, if it is not null, grad_x,
// which is zeros before: many outputs may read a pixel, so that they have to add to it atomically, in any order
template <typename scalar_t, typename T = typename Sum<scalar_t>::type>
__global__ void __launch_bounds__(PIXELS)
pixel_backward(Pixels<T> s, const scalar_t* x, const scalar_t* grad, T* grad_x, T* grad_offset, T* grad_weight) {
  const int64_t kk = s.k * s.k, chunk = blockIdx.y, m = blockIdx.x;
  grad_offset += (chunk * s.M + m) * 2 * kk * s.HW + s.place();
  grad_weight += ((chunk * s.parts + blockIdx.z) * s.M + m) * kk;
  for (int n = 0; n < kk; ++n) {
    T to_weight = 0;
    if (s.place() < s.HW) {
      int at[4];
      const Tap<T> tap = s.tap(n, at);
      T sums[4] = {};
      for (int64_t plane = s.first(); plane < s.last(); ++plane) {
        const T g = static_cast<T>(grad[plane * s.HW + s.place()]);
        for (int ab = 0; ab < 4; ++ab) {
          if (at[ab] < 0) continue;
          sums[ab] += g * static_cast<T>(x[plane * s.HW + at[ab]]);
          if (grad_x) atomicAdd(grad_x + plane * s.HW + at[ab], g * tap.weight * tap.share(ab));
        }
      }
      tap.write_gradient(sums, grad_offset + 2 * n * s.HW, s.HW, to_weight);
    }
    block_sums<1>(&to_weight, shared_memory<T>(), 1, grad_weight + n, 1);
  }
}

// Contiguous arguments whose shapes have been checked
struct Arguments {
  Tensor x, offset, weight;
  int64_t M, C, H, W, k, parts;
  bool shared;
  Arguments(const Tensor& x_, const Tensor& offset_, const Tensor& weight_)
      : x(x_.contiguous()), offset(offset_.contiguous()), weight(weight_.contiguous()) {
    check_dtype(x);
    TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 3, "deform_conv2d: x must be [M,C,H,W] and weight [M,k,k]");
    TORCH_CHECK(offset.device() == x.device() && weight.device() == x.device(), "deform_conv2d: several devices");
    M = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), k = weight.size(2), parts = ceil_div(H * W, PIXELS);
    shared = offset.sizes() == at::IntArrayRef({M, 2 * k * k, 1, 1});
    TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef({M, k, k}) && k % 2 == 1 &&
                          (shared || offset.sizes() == at::IntArrayRef({M, 2 * k * k, H, W})),
                      "deform_conv2d: weight must be [M,k,k], k odd, and offset [M,2kk,H,W] or [M,2kk,1,1]");
  }
  // a Tap is at most as long as 5 numbers
  Tile tile() const { return Tile(M, C, H, W, 2 * REACH + 1, DENSE + 5 * k * k, weight.element_size()); }
  template <typename T> Pixels<T> pixels(int64_t chunks) const {
    TORCH_CHECK(M <= INT_MAX && chunks < 65536 && parts < 65536, "deform_conv2d: too many targets, channels or pixels");
    return {M, C, H * W, int(H), int(W), int(k), int(chunks), int(parts), offset.const_data_ptr<T>(),
            weight.const_data_ptr<T>()};
  }
  // x -> y or, mirrored and for shared offsets only, grad -> grad_x
  template <typename scalar_t> void apply(const Tensor& from, bool mirrored, const Tensor& to) const {
    using T = typename Sum<scalar_t>::type;
    if (!shared) {
      const auto s = pixels<T>(ceil_div(C, CHANNELS));
      return launch("deform_conv2d", pixel_forward<scalar_t>, dim3(M, s.chunks, s.parts), PIXELS, 0, s,
                    from.const_data_ptr<scalar_t>(), to.mutable_data_ptr<scalar_t>());
    }
    const Tile t = tile();
    launch("deform_conv2d, shared offsets", shared_forward<scalar_t>, t.grid(M, t.groups), t.threads, t.shared, t, k,
           mirrored, from.const_data_ptr<scalar_t>(), offset.const_data_ptr<T>(), weight.const_data_ptr<T>(),
           to.mutable_data_ptr<scalar_t>());
  }
};

Tensor deform_conv2d(const Tensor& x, const Tensor& offset, const Tensor& weight) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Arguments a(x, offset, weight);
  const Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() > 0) MEDSEGR_DISPATCH(x.scalar_type(), "deform_conv2d", [&] { a.apply<scalar_t>(a.x, false, y); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> deform_conv2d_backward(const Tensor& grad_, const Tensor& x, const Tensor& offset,
                                                          const Tensor& weight, bool need_x, bool need_offset,
                                                          bool need_weight) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Arguments a(x, offset, weight);
  const Tensor grad = grad_.contiguous();
  const bool fits = grad.sizes() == x.sizes() && grad.options().type_equal(x.options());
  TORCH_CHECK_VALUE(fits, "deform_conv2d: grad must have the shape and dtype of x");
  if (need_x && !a.shared) at::globalContext().alertNotDeterministic("medsegr::deform_conv2d_backward");
  Tensor grad_x = at::empty(need_x ? x.sizes() : 0, x.options());
  Tensor offsets = parts_of(a.offset, 0), weights = parts_of(a.weight, 0);
  if (x.numel() > 0) MEDSEGR_DISPATCH(x.scalar_type(), "deform_conv2d_backward", [&] {
    using T = typename Sum<scalar_t>::type;
    const auto in = a.x.const_data_ptr<scalar_t>(), g = grad.const_data_ptr<scalar_t>();
    if (need_x && a.shared) a.apply<scalar_t>(grad, true, grad_x);
    if (!a.shared) {
      if (need_x) grad_x = at::zeros(x.sizes(), weight.options());
      const auto s = a.pixels<T>(std::clamp<int64_t>(BLOCKS / (a.M * a.parts), 1, a.C));
      offsets = parts_of(a.offset, s.chunks), weights = parts_of(a.weight, s.chunks * a.parts);
      launch("deform_conv2d_backward", pixel_backward<scalar_t>, dim3(a.M, s.chunks, s.parts), PIXELS,
             PIXELS * sizeof(T), s, in, g, need_x ? grad_x.mutable_data_ptr<T>() : nullptr,
             offsets.mutable_data_ptr<T>(), weights.mutable_data_ptr<T>());
    } else if (need_offset || need_weight) {
      const Tile t = a.tile();
      offsets = parts_of(a.offset, t.chunks * t.tiles()), weights = parts_of(a.weight, t.chunks * t.tiles());
      launch("deform_conv2d_backward, shared offsets", shared_backward<scalar_t>, t.grid(a.M, t.chunks), t.threads,
             t.shared, t, a.M, a.k, in, g, a.offset.const_data_ptr<T>(), a.weight.const_data_ptr<T>(),
             offsets.mutable_data_ptr<T>(), weights.mutable_data_ptr<T>());
    }
  });
  return {grad_x.to(x.scalar_type()), need_offset ? offsets.sum(0) : none(weight),
          need_weight ? weights.sum(0) : none(weight)};
}

TORCH_LIBRARY_IMPL(MEDSEGR_LIBRARY, MEDSEGR_KEY, m) {
  m.impl("deform_conv2d", deform_conv2d);
  m.impl("deform_conv2d_backward", deform_conv2d_backward);
}

}  // namespace
}  // namespace medsegr
