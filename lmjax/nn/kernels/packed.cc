// Products of a few rows of activations with packed weights, read as they are stored.
//
// x      float32 [M, I]   rows of activations
// values int8 [F, I], or uint8 [F, I / 2] (see lmjax/nn/packed.py)
// scales float32 [F, N]   one per group of I / N inputs
// y      float32 [M, F]

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kOutputs = 64;  // outputs per piece of work
constexpr int8_t kOffset = 8;     // is added to a weight of 4 bits when it is stored

struct Task {
  const float* x;
  const uint8_t* values;
  const float* scales;
  float* y;
  int64_t rows, inputs, outputs, groups;
};

// Vectors of 16 numbers: compilers split them where the machine's are shorter.
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));
constexpr int64_t kLanes = 16;

template <typename V>
inline V Load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

inline Floats AsFloats(Bytes bytes) {
  // GCC would convert bytes that come straight from memory one by one.
#if defined(__x86_64__)
  asm("" : "+x"(bytes));
#elif defined(__aarch64__)
  asm("" : "+w"(bytes));
#endif
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
}

inline float Sum(Floats v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// One group of one output times R rows of activations, which lie `stride` apart. Several sums run
// beside each other, so that none waits for its last addition. `sums` gets the sums by lane, and
// `rest` those of what fills no vector.
template <int R>
inline void Int8Group(const float* x, int64_t stride, const uint8_t* w, int64_t size, Floats* sums,
                      float* rest) {
  constexpr int kSums = R == 1 ? 4 : R == 2 ? 2 : 1;
  Floats s[R][kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
    for (int k = 0; k < kSums; ++k) {
      const int64_t at = i + k * kLanes;
      const Floats weights = AsFloats(Load<Bytes>(w + at));
      for (int r = 0; r < R; ++r) s[r][k] += weights * Load<Floats>(x + r * stride + at);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int k = 1; k < kSums; ++k) s[r][0] += s[r][k];
    sums[r] = s[r][0];
    rest[r] = 0;
    for (int64_t j = i; j < size; ++j) {
      rest[r] += static_cast<float>(static_cast<int8_t>(w[j])) * x[r * stride + j];
    }
  }
}

// The low halves of the bytes are the first half of the group, the high halves the second.
template <int R>
inline void Int4Group(const float* x, int64_t stride, const uint8_t* w, int64_t size, Floats* sums,
                      float* rest) {
  constexpr int kSums = R <= 2 ? 2 : 1;  // of each half
  const int64_t half = size / 2;
  Floats s[R][2 * kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= half; i += kSums * kLanes) {
    for (int k = 0; k < kSums; ++k) {
      const int64_t at = i + k * kLanes;
      const Bytes bytes = Load<Bytes>(w + at);
      const Floats low = AsFloats((bytes & 15) - kOffset);
      const Floats high = AsFloats(((bytes >> 4) & 15) - kOffset);
      for (int r = 0; r < R; ++r) {
        s[r][2 * k] += low * Load<Floats>(x + r * stride + at);
        s[r][2 * k + 1] += high * Load<Floats>(x + r * stride + half + at);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int k = 1; k < 2 * kSums; ++k) s[r][0] += s[r][k];
    sums[r] = s[r][0];
    rest[r] = 0;
    for (int64_t j = i; j < half; ++j) {
      rest[r] += static_cast<float>((w[j] & 15) - kOffset) * x[r * stride + j] +
                 static_cast<float>((w[j] >> 4) - kOffset) * x[r * stride + half + j];
    }
  }
}

template <int R, int kBits>
void Rows(const Task& t, int64_t row, int64_t first, int64_t last) {
  const int64_t group = t.inputs / t.groups, stored = t.inputs * kBits / 8;
  const float* x = t.x + row * t.inputs;
  for (int64_t f = first; f < last; ++f) {
    const uint8_t* w = t.values + f * stored;
    Floats total[R] = {}, sums[R];
    float left[R] = {}, rest[R];
    for (int64_t n = 0; n < t.groups; ++n) {
      const uint8_t* part = w + n * group * kBits / 8;
      if constexpr (kBits == 8) {
        Int8Group<R>(x + n * group, t.inputs, part, group, sums, rest);
      } else {
        Int4Group<R>(x + n * group, t.inputs, part, group, sums, rest);
      }
      const float scale = t.scales[f * t.groups + n];
      for (int r = 0; r < R; ++r) {
        total[r] += scale * sums[r];
        left[r] += scale * rest[r];
      }
    }
    for (int r = 0; r < R; ++r) t.y[(row + r) * t.outputs + f] = Sum(total[r]) + left[r];
  }
}

template <int kBits>
void Outputs(const Task& t, int64_t first, int64_t last) {
  int64_t row = 0;
  for (; row + 4 <= t.rows; row += 4) Rows<4, kBits>(t, row, first, last);
  for (; row + 2 <= t.rows; row += 2) Rows<2, kBits>(t, row, first, last);
  for (; row < t.rows; ++row) Rows<1, kBits>(t, row, first, last);
}

// Pieces are taken from a counter, by this thread as well: it never waits for a task that has not
// begun, so that several products at once cannot wait for each other.
template <int kBits>
void InPieces(const Task& task, ffi::ThreadPool& pool) {
  struct Shared {
    Task task;
    int64_t pieces;
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  shared->task = task;
  shared->pieces = (task.outputs + kOutputs - 1) / kOutputs;
  auto work = [shared] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < shared->pieces;) {
      const int64_t first = i * kOutputs;
      Outputs<kBits>(shared->task, first, std::min(first + kOutputs, shared->task.outputs));
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  // A product of less than some 100,000 weights is over before another thread has begun.
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1,
                                            task.outputs * task.inputs / 100'000);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (shared->done.load(std::memory_order_acquire) < shared->pieces) std::this_thread::yield();
}

template <int kBits>
ffi::Error Packed(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values,
                  ffi::Buffer<ffi::F32> scales, ffi::ResultBuffer<ffi::F32> y) {
  const auto in = x.dimensions(), of_scales = scales.dimensions();
  const Task task{x.typed_data(), static_cast<const uint8_t*>(values.untyped_data()),
                  scales.typed_data(), y->typed_data(), in[0], in[1], of_scales[0], of_scales[1]};
  InPieces<kBits>(task, pool);
  return ffi::Error::Success();
}

}  // namespace

#define LMJAX_PACKED(name, bits)                                               \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, Packed<bits>,                            \
                                ffi::Ffi::Bind()                               \
                                    .Ctx<ffi::ThreadPool>()                    \
                                    .Arg<ffi::Buffer<ffi::F32>>()              \
                                    .Arg<ffi::AnyBuffer>()                     \
                                    .Arg<ffi::Buffer<ffi::F32>>()              \
                                    .Ret<ffi::Buffer<ffi::F32>>())

LMJAX_PACKED(LmjaxInt8, 8);
LMJAX_PACKED(LmjaxInt4, 4);
