// Plays CUDA on the host: with this header in front and MEDSEGR_HOST defined, g++ compiles ops/*.cu as they are, for
// CPU tensors, under the names torch.ops.medsegr_host.*. Blocks run one after the other. The threads of a block are
// fibers: between two barriers they run one by one, in another order each time, so that a missing barrier shows.
//
// Noticed, and raised as an error: a barrier that only some threads reach, or threads at different barriers; writing
// past the tensors of the operator or its shared memory; failed device assertions. Numbers that were never written are
// NaN, in new tensors and in shared memory, and so is what lies next to them: reading it shows in the result.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>
#include <ucontext.h>
#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <random>
#include <set>
#include <vector>

#define MEDSEGR_LIBRARY medsegr_host
#define MEDSEGR_KEY CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() host::barrier(__LINE__)
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) TORCH_CHECK(condition, "device assertion failed: " #condition)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 { float x, y, z, w; };
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

template <typename T> T min(T a, T b) { return a < b || b != b ? a : b; }  // of NaN and a number: the number
template <typename T> T max(T a, T b) { return a > b || b != b ? a : b; }
inline void atomicAdd(float* to, float value) { *to += value; }
inline void atomicAdd(double* to, double value) { *to += value; }

namespace host {

constexpr size_t STACK = 128 << 10, GUARD = 1 << 12;
constexpr unsigned char POISON = 0xff;  // bytes of a NaN in every floating-point type

inline bool poisoned(const unsigned char* from, size_t n) {
  return std::all_of(from, from + n, [](unsigned char b) { return b == POISON; });
}

// Gives out tensors that are NaN, with NaN around them
struct GuardedAllocator final : c10::Allocator {
  std::mutex mutex;
  std::set<std::pair<unsigned char*, size_t>> living;
  c10::DataPtr allocate(size_t n) override {
    struct Block { GuardedAllocator* owner; unsigned char* bytes; size_t n; };
    void* bytes = std::aligned_alloc(64, (n + 2 * GUARD + 63) / 64 * 64);
    std::memset(bytes, POISON, n + 2 * GUARD);
    auto* block = new Block{this, static_cast<unsigned char*>(bytes), n};
    const std::lock_guard<std::mutex> lock(mutex);
    living.insert({block->bytes, n});
    return {block->bytes + GUARD, block, [](void* context) {
      auto* b = static_cast<Block*>(context);
      {
        const std::lock_guard<std::mutex> lock(b->owner->mutex);
        b->owner->living.erase({b->bytes, b->n});
      }
      std::free(b->bytes);
      delete b;
    }, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
  bool intact() {
    const std::lock_guard<std::mutex> lock(mutex);
    return std::all_of(living.begin(), living.end(), [](const auto& b) {
      return poisoned(b.first, GUARD) && poisoned(b.first + GUARD + b.second, GUARD);
    });
  }
};
inline GuardedAllocator guarded;

// ------------------------------------------------------------------------------------------------------------------
// One block

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  int line = 0;  // of the barrier where it waits
  bool done = false;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline std::exception_ptr failure;
inline std::vector<unsigned char> shared;

inline void barrier(int line) {
  fibers[current].line = line;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void fiber_main() {
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[current].done = true;
}

inline void run_block(const char* name, unsigned threads, std::mt19937& random) {
  std::fill(shared.begin(), shared.end(), POISON);
  std::vector<unsigned> order(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = fibers[t];
    order[t] = t, f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = STACK, f.context.uc_link = &scheduler;
    makecontext(&f.context, fiber_main, 0);
  }
  for (unsigned left = threads; left > 0;) {
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned t : order) {
      current = t, threadIdx = dim3(t);
      swapcontext(&scheduler, &fibers[t].context);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }
    left = std::count_if(fibers.begin(), fibers.begin() + threads, [](const Fiber& f) { return !f.done; });
    TORCH_CHECK(left == 0 || left == threads, std::string(name) + ": " + std::to_string(left) + " of " +
                                                  std::to_string(threads) + " threads wait at a barrier");
    for (unsigned t = 1; left > 0 && t < threads; ++t)
      TORCH_CHECK(fibers[t].line == fibers[0].line,
                  std::string(name) + ": threads wait at the barriers of line " + std::to_string(fibers[t].line) +
                      " and line " + std::to_string(fibers[0].line));
  }
}

}  // namespace host

// ------------------------------------------------------------------------------------------------------------------
// What ops/cuda.h takes from CUDA otherwise

namespace c10::cuda {
struct CUDAGuard {  // at the start of every operator: all that it allocates is watched
  c10::Allocator* before;
  explicit CUDAGuard(at::Device) : before(c10::GetCPUAllocator()) { c10::SetCPUAllocator(&host::guarded); }
  ~CUDAGuard() { c10::SetCPUAllocator(before); }
};
}  // namespace c10::cuda

namespace medsegr {

template <typename T> T* shared_memory() { return reinterpret_cast<T*>(host::shared.data()); }

template <typename... P, typename... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, int threads, size_t bytes, A... args) {
  TORCH_CHECK(threads > 0 && threads <= 1024 && bytes <= 48 << 10 && grid.x <= INT_MAX && grid.y <= 65535 &&
                  grid.z <= 65535 && grid.x * grid.y * grid.z > 0, std::string(name) + ": invalid launch");
  std::mt19937 random(0);
  gridDim = grid, blockDim = dim3(threads);
  host::body = [&] { kernel(static_cast<P>(args)...); };
  host::shared.resize(bytes + host::GUARD);
  if (host::fibers.size() < size_t(threads)) host::fibers.resize(threads);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        host::run_block(name, threads, random);
        TORCH_CHECK(host::poisoned(host::shared.data() + bytes, host::GUARD),
                    std::string(name) + ": wrote past its shared memory");
      }
  TORCH_CHECK(host::guarded.intact(), std::string(name) + ": wrote outside of a tensor");
}

}  // namespace medsegr
