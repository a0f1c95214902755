// Block-sparse attention on x86 CPUs, by torch's micro-kernel for matrix products (oneDNN: AMX for bf16, AVX for fp32).
//
// Keys and values are packed once per key head into the order that the micro-kernel reads. A tile is one query block of
// one head; its key blocks come in chunks that stay in the cache, with a running maximum from chunk to chunk. Logits,
// sums and the output are fp32; weights are rounded to the type of v for the second product.
//
// No Python and no OpenMP: every thread that calls takes items from a shared counter until none is left.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kStep = 2 * Vec::size();  // floats that the loops take at a time; rows are padded to it

int64_t padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

}  // namespace

// One batch row. Mirrored field by field in forward.py. Strides count elements.
struct Call {
  const void* q;         // (sq, heads, d)
  const void* k;         // (sk, groups, d)
  const void* v;         // (sk, groups, d)
  void* out;             // (sq, heads, d)
  float* lse;            // (heads, sq)
  void* packed_k;        // (groups, nk, d, kv_block)
  void* packed_v;        // (groups, nk, kv_block, d)
  const int32_t* index;  // (heads, nq, cap), key blocks of every query block
  const int32_t* count;  // (heads, nq)
  const uint8_t* exists; // (sk), keys that are attended to; null for all
  const float* bias;     // (heads, sk), natural logarithm; null for none
  std::atomic<int64_t>* next;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head;
  int64_t index_head, index_row, count_head, bias_head;
  int64_t heads, groups, sq, sk, d, q_block, kv_block, nq, nk, at_once;
  float scale;
};

namespace {

template <typename T>
struct Kind;

template <>
struct Kind<float> {
  static constexpr bool kPairs = false;  // whether the micro-kernel reads pairs of rows
  static Vec exp(Vec x) { return x.exp(); }
  static void store(float* to, Vec a, Vec b) {
    a.store(to);
    b.store(to + Vec::size());
  }
};

template <>
struct Kind<at::BFloat16> {
  static constexpr bool kPairs = true;
  static Vec exp(Vec x) { return x.exp_u20(); }  // 20 bits, where a weight keeps 8
  static void store(at::BFloat16* to, Vec a, Vec b) { at::vec::convert_from_float<at::BFloat16>(a, b).store(to); }
};

template <typename T>
void product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const T* a, const T* b,
             float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, Kind<T>::kPairs);
}

// Rows of a key block that the call has: existing tokens that the mask does not bar.
bool attended(const Call& c, int64_t token) { return token < c.sk && (!c.exists || c.exists[token]); }

// Transpose block j of a key head into (d, kv_block); of bf16, pairs of columns stay together. Barred keys are zeros.
template <typename T>
void pack_keys(const Call& c, int64_t g, int64_t j) {
  constexpr int64_t kTile = Vec::size();
  const int64_t n = c.kv_block, words = c.d * sizeof(T) / sizeof(float);  // a float holds a pair of bf16
  float* to = reinterpret_cast<float*>(static_cast<T*>(c.packed_k) + (g * c.nk + j) * n * c.d);
  const T* from = static_cast<const T*>(c.k) + g * c.k_head;
  const bool aligned = c.k_token * sizeof(T) % sizeof(float) == 0;
  for (int64_t t0 = 0; t0 < n; t0 += kTile) {
    const int64_t t1 = std::min(n, t0 + kTile);
    bool whole = aligned && t1 - t0 == kTile;
    for (int64_t t = t0; t < t1; ++t) whole &= attended(c, j * n + t);
    int64_t w0 = 0;
    if (whole) {
      const float* rows = reinterpret_cast<const float*>(from + (j * n + t0) * c.k_token);
      const int64_t apart = c.k_token * sizeof(T) / sizeof(float);
      for (; w0 + kTile <= words; w0 += kTile)
        at::vec::transpose_mxn<float, kTile, kTile>(rows + w0, apart, to + w0 * n + t0, n);
    }
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t token = j * n + t;
      const char* row = attended(c, token) ? reinterpret_cast<const char*>(from + token * c.k_token) : nullptr;
      for (int64_t w = w0; w < words; ++w) {
        if (row) {
          std::memcpy(to + w * n + t, row + w * sizeof(float), sizeof(float));
        } else {
          to[w * n + t] = 0.f;
        }
      }
    }
  }
}

// Copy block j of a value head into (kv_block, d); of bf16, two rows are interleaved. Barred values are zeros.
template <typename T>
void pack_values(const Call& c, int64_t g, int64_t j) {
  const int64_t n = c.kv_block, d = c.d;
  T* to = static_cast<T*>(c.packed_v) + (g * c.nk + j) * n * d;
  const T* from = static_cast<const T*>(c.v) + g * c.v_head;
  auto row = [&](int64_t t) { return attended(c, j * n + t) ? from + (j * n + t) * c.v_token : nullptr; };
  if constexpr (Kind<T>::kPairs) {
    for (int64_t t = 0; t < n; t += 2, to += 2 * d) {
      const T *even = row(t), *odd = row(t + 1);
      if (even && odd) {
        for (int64_t x = 0; x < d; ++x) {
          to[2 * x] = even[x];
          to[2 * x + 1] = odd[x];
        }
      } else {
        for (int64_t x = 0; x < d; ++x) {
          to[2 * x] = even ? even[x] : T(0.f);
          to[2 * x + 1] = odd ? odd[x] : T(0.f);
        }
      }
    }
  } else {
    for (int64_t t = 0; t < n; ++t, to += d) {
      if (const T* there = row(t)) {
        std::memcpy(to, there, d * sizeof(T));
      } else {
        std::memset(to, 0, d * sizeof(T));
      }
    }
  }
}

struct Buffers {
  std::vector<float> logits, acc, top, sum;
  std::vector<char> weights, row;
};

// Mask and bias of the columns of one chunk: what is added to the scaled logits. Returns whether anything is.
bool added(const Call& c, int64_t h, const int32_t* list, int64_t blocks, int64_t width, std::vector<float>& to) {
  const int64_t n = c.kv_block, cols = blocks * n;
  bool any = c.bias || c.exists || width > cols;
  for (int64_t j = 0; j < blocks && !any; ++j) any = (list[j] + int64_t(1)) * n > c.sk;
  if (!any) return false;
  to.assign(width, -kInf);
  for (int64_t j = 0; j < blocks; ++j)
    for (int64_t t = 0; t < n; ++t)
      if (const int64_t token = list[j] * n + t; attended(c, token))
        to[j * n + t] = c.bias ? c.bias[h * c.bias_head + token] : 0.f;
  return true;
}

template <typename T>
void tile(const Call& c, int64_t h, int64_t u, Buffers& b, std::vector<float>& extra) {
  const int64_t m = std::min(c.q_block, c.sq - u * c.q_block), d = c.d, n = c.kv_block, wide = padded(d);
  const int64_t g = h / (c.heads / c.groups), count = c.count[h * c.count_head + u];
  const int32_t* list = c.index + h * c.index_head + u * c.index_row;
  const T* q = static_cast<const T*>(c.q) + h * c.q_head + u * c.q_block * c.q_token;
  const T* keys = static_cast<const T*>(c.packed_k) + g * c.nk * n * d;
  const T* values = static_cast<const T*>(c.packed_v) + g * c.nk * n * d;
  float *logits = b.logits.data(), *acc = b.acc.data(), *top = b.top.data(), *sum = b.sum.data();
  T* weights = reinterpret_cast<T*>(b.weights.data());
  std::fill_n(top, m, -kInf);
  std::fill_n(sum, m, 0.f);
  if (!count) std::fill_n(acc, m * wide, 0.f);
  const Vec scale(c.scale);
  for (int64_t first = 0; first < count; first += c.at_once) {
    const int64_t blocks = std::min(c.at_once, count - first), cols = blocks * n, width = padded(cols);
    for (int64_t j = 0; j < blocks; ++j)
      product<T>(m, n, d, c.q_token, n, width, false, q, keys + list[first + j] * n * d, logits + j * n);
    const bool altered = added(c, h, list + first, blocks, width, extra);
    for (int64_t r = 0; r < m; ++r) {
      float* row = logits + r * width;
      Vec high0(-kInf), high1(-kInf);
      if (altered) {
        for (int64_t x = cols; x < width; ++x) row[x] = 0.f;
        for (int64_t x = 0; x < width; x += kStep) {
          const float* more = extra.data() + x;
          const Vec a = at::vec::fmadd(Vec::loadu(row + x), scale, Vec::loadu(more));
          const Vec z = at::vec::fmadd(Vec::loadu(row + x + Vec::size()), scale, Vec::loadu(more + Vec::size()));
          a.store(row + x);
          z.store(row + x + Vec::size());
          high0 = at::vec::maximum(high0, a);
          high1 = at::vec::maximum(high1, z);
        }
      } else {
        for (int64_t x = 0; x < width; x += kStep) {
          high0 = at::vec::maximum(high0, Vec::loadu(row + x) * scale);
          high1 = at::vec::maximum(high1, Vec::loadu(row + x + Vec::size()) * scale);
        }
      }
      const float found = at::vec::vec_reduce_all<float>(
          [](Vec x, Vec y) { return at::vec::maximum(x, y); }, at::vec::maximum(high0, high1));
      const float before = top[r], now = found > before || std::isnan(found) ? found : before;
      const float base = now == -kInf ? 0.f : now;
      const Vec factor = altered ? Vec(1.f) : scale, shift(base);
      Vec sum0(0.f), sum1(0.f);
      for (int64_t x = 0; x < width; x += kStep) {
        const Vec a = Kind<T>::exp(at::vec::fmsub(Vec::loadu(row + x), factor, shift));
        const Vec z = Kind<T>::exp(at::vec::fmsub(Vec::loadu(row + x + Vec::size()), factor, shift));
        sum0 = sum0 + a;
        sum1 = sum1 + z;
        Kind<T>::store(weights + r * width + x, a, z);
      }
      const float part = at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, sum0 + sum1);
      if (first) {
        const float keep = std::exp(before - base);
        sum[r] = sum[r] * keep + part;
        if (keep != 1.f)
          for (int64_t x = 0; x < wide; x += Vec::size())
            (Vec::loadu(acc + r * wide + x) * Vec(keep)).store(acc + r * wide + x);
      } else {
        sum[r] = part;
      }
      top[r] = now;
    }
    for (int64_t j = 0; j < blocks; ++j)
      product<T>(m, d, n, width, d, wide, first + j > 0, weights + j * n, values + list[first + j] * n * d, acc);
  }
  T* row = reinterpret_cast<T*>(b.row.data());
  T* out = static_cast<T*>(c.out) + h * c.out_head + u * c.q_block * c.out_token;
  for (int64_t r = 0; r < m; ++r) {
    const Vec share(sum[r] == 0.f ? 0.f : 1.f / sum[r]);
    for (int64_t x = 0; x < wide; x += kStep)
      Kind<T>::store(row + x, Vec::loadu(acc + r * wide + x) * share, Vec::loadu(acc + r * wide + x + Vec::size()) * share);
    std::memcpy(out + r * c.out_token, row, d * sizeof(T));
    c.lse[h * c.sq + u * c.q_block + r] = std::log(sum[r]) + top[r];
  }
}

template <typename T>
void pack(const Call& c) {
  for (int64_t i; (i = c.next->fetch_add(1)) < c.groups * c.nk;) {
    pack_keys<T>(c, i / c.nk, i % c.nk);
    pack_values<T>(c, i / c.nk, i % c.nk);
  }
}

template <typename T>
void attend(const Call& c) {
  Buffers b;
  std::vector<float> extra;
  const int64_t width = padded(c.at_once * c.kv_block), wide = padded(c.d);
  b.logits.resize(c.q_block * width);
  b.weights.resize(c.q_block * width * sizeof(T));
  b.acc.resize(c.q_block * wide);
  b.row.resize(wide * sizeof(T));
  b.top.resize(c.q_block);
  b.sum.resize(c.q_block);
  for (int64_t i; (i = c.next->fetch_add(1)) < c.heads * c.nq;) tile<T>(c, i / c.nq, i % c.nq, b, extra);
  at::native::cpublas::brgemm_release(Kind<T>::kPairs);
}

// 0 when done, 1 when torch's micro-kernel refuses this type on this CPU, 2 when memory is short.
template <typename F>
int guarded(F run) {
  try {
    run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 2;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace

extern "C" {

int dit_attn_pack(const Call* call, int bf16) {
  return guarded([&] { bf16 ? pack<at::BFloat16>(*call) : pack<float>(*call); });
}

int dit_attn_attend(const Call* call, int bf16) {
  return guarded([&] { bf16 ? attend<at::BFloat16>(*call) : attend<float>(*call); });
}

// Whether the micro-kernel multiplies a type on this CPU.
int dit_attn_supports(int bf16) {
  return guarded([&] {
    std::vector<float> c(256), x(256);
    if (bf16) {
      std::vector<at::BFloat16> a(256), b(256);
      product<at::BFloat16>(16, 16, 16, 16, 16, 16, false, a.data(), b.data(), c.data());
    } else {
      std::vector<float> a(256), b(256);
      product<float>(16, 16, 16, 16, 16, 16, false, a.data(), b.data(), c.data());
    }
    at::native::cpublas::brgemm_release(bf16);
  });
}
}
