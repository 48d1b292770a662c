// What the two CUDA operators share: how planes are dealt out to blocks and threads, the sliding window, block sums.
//
// A block computes a tile of a few channel planes of one target. Its inputs are brought into shared memory in the type
// of the sums, column by column, with a halo of what lies around the tile: zeros outside the image. A thread computes a
// strip: R rows of one column. It reads each number of a column of the tile once and uses it for all the outputs of its
// strip that it touches, since reading shared memory is slower than multiplying.
//
// tests/host_cuda.h compiles the same files for the CPU, with MEDSEGR_HOST, and executes them thread by thread.
#pragma once
#include "shared.h"
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#include <algorithm>
#include <climits>
#include <tuple>
#include <vector>
#ifndef MEDSEGR_HOST
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define MEDSEGR_LIBRARY medsegr
#define MEDSEGR_KEY CUDA
#endif

namespace medsegr {
namespace {

constexpr int R = 16;             // rows of a strip
constexpr int SIDE = 64;          // rows and columns of a tile, at most
constexpr int THREADS = 256;      // of a block, at most
constexpr int BLOCKS = 1024;      // so many give each of the 132 multiprocessors of an H100 several
constexpr int SHARED = 48 << 10;  // bytes of shared memory that any block may have
constexpr int LARGEST = 9;        // kernel size that is compiled as a constant

// Messages are one string each: TORCH_CHECK with several parts, or with a number, puts them together in a stream of the
// C++ library, and on a machine with g++ 13.3, nvcc 13.0 and PyTorch 2.11 that was a segmentation fault. AT_DISPATCH does
// so too where a type is not among its own; these are refused before.
inline void check_dtype(const Tensor& x) {
  const auto type = x.scalar_type();
#ifdef MEDSEGR_HOST
  if (type == at::kDouble) return;
#endif
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                    "x must be float32, float16 or bfloat16");
}

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Rows in which a column of a k x k kernel is stored, with zeros at the end: 16 bytes are read at once, and sizes above
// LARGEST are worked through 8 rows at a time.
__host__ __device__ constexpr int column_rows(int k) { return k <= LARGEST ? (k + 3) / 4 * 4 : (k + 7) / 8 * 8; }

#ifndef MEDSEGR_HOST
template <typename... P, typename... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, int threads, size_t shared, A... args) {
  kernel<<<grid, threads, shared, c10::cuda::getCurrentCUDAStream()>>>(static_cast<P>(args)...);
  const cudaError_t error = cudaGetLastError();
  TORCH_CHECK(error == cudaSuccess, std::string(name) + ": " + cudaGetErrorString(error));
}

// dynamic shared memory; its size is given at the launch
template <typename T> __device__ T* shared_memory() {
  extern __shared__ float4 bytes[];  // for its alignment
  return reinterpret_cast<T*>(bytes);
}
#endif

// [n, sizes of `like`]: n parts of a gradient, to be summed
inline Tensor parts_of(const Tensor& like, int64_t n) {
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes.insert(sizes.begin(), n);
  return at::empty(sizes, like.options());
}

// How [H,W] planes of C channels are cut up. A tile is rows x cols outputs, and down x across tiles make a plane. In
// shared memory a tile has a halo for a kernel of size `window` and is thus height x width; `planes` channels of it, a
// group, come after `front` numbers of something else. Kernels that sum over channels give a block one of `chunks`
// shares of the groups.
struct Tile {
  int C, H, W, pad, rows, cols, down, across, height, width, plane, front, planes, groups, chunks, threads;
  int64_t HW;
  size_t shared;  // bytes

  Tile(int64_t targets, int64_t C_, int64_t H_, int64_t W_, int window, int64_t front_, size_t bytes) {
    TORCH_CHECK(C_ <= INT_MAX && H_ * W_ <= INT_MAX / 2, "too many channels or pixels");
    C = C_, H = H_, W = W_, HW = H_ * W_, pad = window / 2, front = round_up(front_, 4);
    const int below = window <= LARGEST ? window - 1 : column_rows(window) - 1;
    const int64_t scratch = LARGEST * THREADS;  // for block_sums
    int64_t space = 0;
    for (int side = SIDE; side >= R; side /= 2) {  // smaller tiles where the kernel is large
      cols = ceil_div(W, ceil_div(W, side)), across = ceil_div(W, cols);
      rows = round_up(ceil_div(H, ceil_div(H, side)), R), down = ceil_div(H, rows);
      // Threads that work side by side read numbers that are a column apart, and should find them in different banks
      // of shared memory: columns have an odd height, and narrow planes follow each other as their columns do.
      height = (rows + below) | 1, width = cols + window - 1;
      plane = height * width, plane += (cols * height - plane) & 31;
      space = SHARED / static_cast<int64_t>(bytes) - front;
      if (plane <= space) break;
    }
    TORCH_CHECK(plane <= space && scratch <= space, "the kernel is too large for CUDA");
    const int64_t tiles = down * across;
    const int64_t most = std::min<int64_t>({THREADS / strips(), space / plane, INT_MAX / HW, C});
    planes = std::clamp<int64_t>(targets * C * tiles / BLOCKS, 1, most);
    groups = ceil_div(C, planes), planes = ceil_div(C, groups);
    chunks = std::clamp<int64_t>(BLOCKS / std::max<int64_t>(1, targets * tiles), 1, groups);
    threads = round_up(planes * strips(), 32);
    shared = round_up((front + std::max<int64_t>(planes * plane, scratch)) * bytes, 16);
  }
  __host__ __device__ int strips() const { return cols * (rows / R); }  // of a plane of a tile
  __host__ __device__ int64_t tiles() const { return static_cast<int64_t>(down) * across; }
  // a block for each tile of each share (a group or a chunk of groups) of each target
  dim3 grid(int64_t targets, int shares) const {
    TORCH_CHECK(targets * shares <= INT_MAX && down < 65536 && across < 65536, "too many targets, rows or columns");
    return dim3(targets * shares, down, across);
  }
};

// What a thread has to do
struct Place {
  int64_t m;             // its block's target,
  int share, top, left;  // share, and start of the tile in the image
  int plane, y, x, at;   // its strip's plane in the group, start in the image, and window in the tile
  __device__ Place(const Tile& t, int shares) {
    m = blockIdx.x / shares, share = blockIdx.x % shares;
    top = blockIdx.y * t.rows, left = blockIdx.z * t.cols;
    const int strip = threadIdx.x % t.strips(), row = strip / t.cols * R, col = strip % t.cols;
    plane = threadIdx.x / t.strips(), y = top + row, x = left + col;
    at = plane * t.plane + col * t.height + row;
  }
  __device__ bool busy(const Tile& t, int planes) const { return plane < planes && x < t.W; }
  // the channels of a chunk, and the number of its sums among those of all chunks and tiles
  __device__ int first(const Tile& t) const { return static_cast<int64_t>(share) * t.groups / t.chunks * t.planes; }
  __device__ int last(const Tile& t) const {
    return min(static_cast<int>(static_cast<int64_t>(share + 1) * t.groups / t.chunks * t.planes), t.C);
  }
  __device__ int part(const Tile& t) const { return (share * t.down + blockIdx.y) * t.across + blockIdx.z; }
};

// Calls f(r, pixel, at) for the rows of a strip that are in the image; at is the pixel's place in the group. These are
// 32-bit numbers, to be added to addresses that all threads have in common: 64-bit ones would fill the registers.
// AGAIN, in a loop whose sums fill the registers: the places are computed in every round, not kept (an empty asm, behind
// which the compiler does not know the numbers any more).
template <bool AGAIN = false, typename F>
__device__ __forceinline__ void each_row(const Tile& t, const Place& p, F f) {
  unsigned pixel = p.y * t.W + p.x, at = p.plane * t.H * t.W + pixel;
  const int rows = t.H - p.y;
  if constexpr (AGAIN) asm("" : "+r"(pixel), "+r"(at));
#pragma unroll
  for (int r = 0; r < R; ++r)
    if (r < rows) f(r, pixel + r * t.W, at + r * t.W);
}

// Zeros, before fill: what lies outside the image keeps them.
template <typename T> __device__ void clear(const Tile& t, T* tile) {
  float4* quad = reinterpret_cast<float4*>(tile);
  const int size = (t.planes * t.plane * sizeof(T) + 15) / 16;
  for (int i = threadIdx.x; i < size; i += blockDim.x) quad[i] = {0, 0, 0, 0};
  __syncthreads();
}

// Brings in `planes` channels [H,W], times the gate [H,W] if there is one. First every thread brings what lies under
// its own strip, all of it at once, so that the reads wait for memory together; then comes the halo, if the image does
// not end there.
template <bool AGAIN = false, typename scalar_t, typename T>
__device__ __forceinline__ void fill(const Tile& t, const Place& p, int planes, const scalar_t* from, const T* gate,
                                     T* tile) {
  T own[R];
  if (p.busy(t, planes)) {
    each_row<AGAIN>(t, p, [&](int r, unsigned, unsigned at) { own[r] = static_cast<T>(from[at]); });
    if (gate) each_row<AGAIN>(t, p, [&](int r, unsigned pixel, unsigned) { own[r] *= gate[pixel]; });
    T* to = tile + p.at + t.pad * t.height + t.pad;
    each_row<AGAIN>(t, p, [&](int r, unsigned, unsigned) { to[r] = own[r]; });
  }
  const int size = t.height * t.width;
  for (int i = threadIdx.x; t.tiles() > 1 && i < planes * size; i += blockDim.x) {
    const int row = i % size / t.width - t.pad, col = i % t.width - t.pad, y = p.top + row, x = p.left + col;
    const bool strip = row >= 0 && row < t.rows && col >= 0 && col < t.cols;
    if (strip || y < 0 || y >= t.H || x < 0 || x >= t.W) continue;
    T* to = tile + i / size * t.plane + (col + t.pad) * t.height + row + t.pad;
    *to = static_cast<T>(from[(i / size * t.H + y) * t.W + x]) * (gate ? gate[y * t.W + x] : T(1));
  }
  __syncthreads();
}

// acc[r] += sum_i weight[i] * window[r + i], down one column: a number read once serves up to N outputs
template <int N, typename T>
__device__ __forceinline__ void slide(T (&acc)[R], const T* window, const T* weight) {
  T w[N];
#pragma unroll
  for (int i = 0; i < N; ++i) w[i] = weight[i];
#pragma unroll
  for (int s = 0; s < R + N - 1; ++s) {
    const T v = window[s];
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (s - i >= 0 && s - i < R) acc[s - i] += w[i] * v;
  }
}

// acc[r] += the k x k kernel at `weight`, stored column by column, on the strip's window. K = k, or 0 for large k.
template <int K, typename T>
__device__ __forceinline__ void convolve(T (&acc)[R], const T* window, int height, int k, const T* weight) {
  if constexpr (K > 0) {
#pragma unroll
    for (int j = 0; j < K; ++j) slide<K>(acc, window + j * height, weight + j * column_rows(K));
  } else {
    const int rows = column_rows(k);
    for (int j = 0; j < k; ++j)
      for (int i = 0; i < rows; i += 8) slide<8>(acc, window + j * height + i, weight + j * rows + i);
  }
}

// sums[j,i] += sum_r grad[r] * window[r + i, j]: the strip's part in the gradient of an N x COLS part of a kernel
template <int N, int COLS, typename T>
__device__ __forceinline__ void correlate(T (&sums)[COLS * N], const T* window, int height, const T (&grad)[R]) {
#pragma unroll
  for (int j = 0; j < COLS; ++j)
#pragma unroll
    for (int s = 0; s < R + N - 1; ++s) {
      const T v = window[j * height + s];
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (s - i >= 0 && s - i < R) sums[j * N + i] += v * grad[s - i];
    }
}

// sums[j,i] += sum_cp (gate * x)[c,p + (i,j)] * grad[c,p] of a chunk of the channels, for an N x COLS part of a kernel
// whose window starts `shift` after that of the tile
template <int N, int COLS, typename scalar_t, typename T>
__device__ __forceinline__ void kernel_sums(const Tile& t, const Place& p, const scalar_t* x, const T* gate,
                                            const scalar_t* grad, T* tile, int shift, T (&sums)[COLS * N]) {
  const int64_t step = t.planes * t.HW;
  clear(t, tile);
  for (int c = p.first(t); c < p.last(t); c += t.planes, x += step, grad += step) {
    const int planes = min(t.planes, p.last(t) - c);
    __syncthreads();  // what was in the tile has been used
    fill<true>(t, p, planes, x, gate, tile);
    if (!p.busy(t, planes)) continue;
    T g[R] = {};
    each_row<true>(t, p, [&](int r, unsigned, unsigned at) { g[r] = static_cast<T>(grad[at]); });
    correlate<N, COLS>(sums, tile + p.at + shift, t.height, g);
  }
}

// N numbers of each thread -> their sums over the block, out[i * step] for i < count; always in the same order. scratch
// is N numbers for each thread. All threads of the block have to call it.
template <int N, typename T>
__device__ void block_sums(const T* number, T* scratch, int count, T* out, int step) {
  const int threads = blockDim.x;
  __syncthreads();  // what is in scratch has been used
#pragma unroll
  for (int i = 0; i < N; ++i) scratch[i * threads + threadIdx.x] = number[i];
  __syncthreads();
  for (int t = threadIdx.x; t < N * 32; t += threads) {  // 32 threads share a sum
    T* row = scratch + t / 32 * threads;
    for (int other = t % 32 + 32; other < threads; other += 32) row[t % 32] += row[other];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += threads) {
    T sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += scratch[i * threads + lane];
    out[i * step] = sum;
  }
}

// The numbers that x may have. float64 is for the tests on the host only: it would lengthen every build.
#define MEDSEGR_FLOATS(...)                                                              \
  AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__)     \
  AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__)
#ifdef MEDSEGR_HOST
#define MEDSEGR_DISPATCH(type, name, ...) \
  AT_DISPATCH_SWITCH(type, name, MEDSEGR_FLOATS(__VA_ARGS__) AT_DISPATCH_CASE(at::kDouble, __VA_ARGS__))
#else
#define MEDSEGR_DISPATCH(type, name, ...) AT_DISPATCH_SWITCH(type, name, MEDSEGR_FLOATS(__VA_ARGS__))
#endif

}  // namespace
}  // namespace medsegr
