// Block-sparse attention on x86 CPUs, by torch's micro-kernel for matrix products (oneDNN: AMX for bf16, AVX for fp32).
//
// Keys and values are packed once per key head into the order that the micro-kernel reads. A tile is one query block of
// one head; its key blocks come in chunks that stay in the cache, with a running maximum from chunk to chunk. Logits,
// sums and the output are fp32; weights are rounded to the type of v for the second product.
//
// No Python. Threads take items from a shared counter until none is left. They are those of torch's OpenMP, which go on
// spinning for milliseconds after an operation and would otherwise hold the cores that other threads wait for.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kStep = 2 * Vec::size();  // floats that the loops take at a time; rows are padded to it

int64_t padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

}  // namespace

// Keys and values of some heads, in blocks. Mirrored field by field in forward.py, as Call is. Strides count elements.
struct Keys {
  const void* k;   // (length, groups, d)
  const void* v;   // (length, groups, d)
  void* packed_k;  // (groups, blocks, d, block)
  void* packed_v;  // (groups, blocks, block, d)
  int64_t k_token, k_head, v_token, v_head;
  int64_t length, block, blocks;
};

// One batch row and some of its heads.
struct Call {
  Keys keys;
  Keys pooled;             // keys that stand for those of skipped blocks; none where blocks is 0
  const void* q;           // (sq, heads, d)
  void* out;               // (sq, heads, d)
  float* lse;              // (heads, sq)
  const int32_t* index;    // (heads, nq, cap), key blocks of every query block
  const int32_t* count;    // (heads, nq)
  const uint8_t* exists;   // (length), keys that are attended to; null for all
  const float* bias;       // (heads, length), natural logarithm; null for none
  const float* weight;     // (heads, pooled length), natural logarithm of the keys that a pooled one stands for
  const uint8_t* left_out; // (heads, nq, blocks), skipped blocks without pooled keys; null for none
  const float* stand_in;   // (groups, pooled length, padded d), values of the pooled keys; of statistics alone
  float* stats;            // (heads, nq, blocks), where statistics of the blocks are wanted; null for none
  std::atomic<int64_t>* next;
  int64_t q_token, q_head, out_token, out_head;
  int64_t index_head, index_row, count_head, bias_head, weight_head, left_out_head, stand_in_head, stand_in_token;
  int64_t heads, groups, sq, d, q_block, nq, at_once, pooled_per_block;
  int64_t errors;  // whether the statistics are errors, else masses; pooled keys stand in for a block then, no more
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

// Whether a key is one that the call has: it exists, and the mask does not bar it.
bool attended(int64_t token, int64_t length, const uint8_t* exists) {
  return token < length && (!exists || exists[token]);
}

// Transpose block j of a key head into (d, block); of bf16, pairs of columns stay together. Barred keys are zeros.
template <typename T>
void pack_keys(const Keys& keys, const uint8_t* exists, int64_t d, int64_t g, int64_t j) {
  constexpr int64_t kTile = Vec::size();
  const int64_t n = keys.block, words = d * sizeof(T) / sizeof(float);  // a float holds a pair of bf16
  float* to = reinterpret_cast<float*>(static_cast<T*>(keys.packed_k) + (g * keys.blocks + j) * n * d);
  const T* from = static_cast<const T*>(keys.k) + g * keys.k_head + j * n * keys.k_token;
  auto there = [&](int64_t t) { return attended(j * n + t, keys.length, exists); };
  const bool aligned = keys.k_token * sizeof(T) % sizeof(float) == 0;
  for (int64_t t0 = 0; t0 < n; t0 += kTile) {
    const int64_t t1 = std::min(n, t0 + kTile);
    bool whole = aligned && t1 - t0 == kTile;
    for (int64_t t = t0; t < t1; ++t) whole &= there(t);
    int64_t w0 = 0;
    if (whole) {
      const float* rows = reinterpret_cast<const float*>(from + t0 * keys.k_token);
      const int64_t apart = keys.k_token * sizeof(T) / sizeof(float);
      for (; w0 + kTile <= words; w0 += kTile)
        at::vec::transpose_mxn<float, kTile, kTile>(rows + w0, apart, to + w0 * n + t0, n);
    }
    for (int64_t t = t0; t < t1; ++t) {
      const char* row = there(t) ? reinterpret_cast<const char*>(from + t * keys.k_token) : nullptr;
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

// Copy block j of a value head into (block, d); of bf16, two rows are interleaved. Barred values are zeros.
template <typename T>
void pack_values(const Keys& keys, const uint8_t* exists, int64_t d, int64_t g, int64_t j) {
  const int64_t n = keys.block;
  T* to = static_cast<T*>(keys.packed_v) + (g * keys.blocks + j) * n * d;
  const T* from = static_cast<const T*>(keys.v) + g * keys.v_head + j * n * keys.v_token;
  auto row = [&](int64_t t) { return attended(j * n + t, keys.length, exists) ? from + t * keys.v_token : nullptr; };
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

// The softmax of one query block, as far as it has come: rows of the accumulator are padded.
template <typename T>
struct Tile {
  const Call& c;
  const T* q = nullptr;
  int64_t rows = 0;
  bool started = false;
  std::vector<float> logits, acc, top, sum, extra, part, stand;
  std::vector<T> weights, row;
  std::vector<uint8_t> taken;  // key blocks whose pooled keys do not count

  explicit Tile(const Call& call) : c(call) {
    const int64_t width = padded(std::max(c.at_once * c.keys.block, c.pooled.block)), wide = padded(c.d);
    logits.resize(c.q_block * width);
    weights.resize(c.q_block * width);
    extra.resize(width);
    acc.resize(c.q_block * wide);
    row.resize(wide);
    top.resize(c.q_block);
    sum.resize(c.q_block);
    taken.resize(c.keys.blocks);
    if (c.stats) {
      part.resize(c.q_block * wide);
      stand.resize(c.q_block * c.pooled.blocks * c.pooled.block);
    }
  }

  void begin(int64_t h, int64_t u) {
    rows = std::min(c.q_block, c.sq - u * c.q_block);
    q = static_cast<const T*>(c.q) + h * c.q_head + u * c.q_block * c.q_token;
    started = false;
    std::fill_n(top.data(), rows, -kInf);
    std::fill_n(sum.data(), rows, 0.f);
    std::fill_n(acc.data(), rows * padded(c.d), 0.f);
  }

  // Take in some blocks of a key head. `extra` is added to the scaled logits of the columns, where `altered`.
  template <typename Block>
  void absorb(const Keys& keys, int64_t g, int64_t blocks, Block block, bool altered) {
    const int64_t n = keys.block, d = c.d, wide = padded(d), cols = blocks * n, width = padded(cols);
    const T* k = static_cast<const T*>(keys.packed_k) + g * keys.blocks * n * d;
    const T* v = static_cast<const T*>(keys.packed_v) + g * keys.blocks * n * d;
    const Vec scale(c.scale);
    for (int64_t j = 0; j < blocks; ++j)
      product<T>(rows, n, d, c.q_token, n, width, false, q, k + block(j) * n * d, logits.data() + j * n);
    for (int64_t r = 0; r < rows; ++r) {
      float* s = logits.data() + r * width;
      Vec high0(-kInf), high1(-kInf);
      if (altered) {
        std::fill(s + cols, s + width, 0.f);
        for (int64_t x = 0; x < width; x += kStep) {
          const float* more = extra.data() + x;
          const Vec a = at::vec::fmadd(Vec::loadu(s + x), scale, Vec::loadu(more));
          const Vec z = at::vec::fmadd(Vec::loadu(s + x + Vec::size()), scale, Vec::loadu(more + Vec::size()));
          a.store(s + x);
          z.store(s + x + Vec::size());
          high0 = at::vec::maximum(high0, a);
          high1 = at::vec::maximum(high1, z);
        }
      } else {
        for (int64_t x = 0; x < width; x += kStep) {
          high0 = at::vec::maximum(high0, Vec::loadu(s + x) * scale);
          high1 = at::vec::maximum(high1, Vec::loadu(s + x + Vec::size()) * scale);
        }
      }
      const float found = at::vec::vec_reduce_all<float>(
          [](Vec x, Vec y) { return at::vec::maximum(x, y); }, at::vec::maximum(high0, high1));
      const float before = top[r], now = found > before || std::isnan(found) ? found : before;
      const float base = now == -kInf ? 0.f : now;
      const Vec factor = altered ? Vec(1.f) : scale, shift(base);
      Vec sum0(0.f), sum1(0.f);
      for (int64_t x = 0; x < width; x += kStep) {
        const Vec a = Kind<T>::exp(at::vec::fmsub(Vec::loadu(s + x), factor, shift));
        const Vec z = Kind<T>::exp(at::vec::fmsub(Vec::loadu(s + x + Vec::size()), factor, shift));
        sum0 = sum0 + a;
        sum1 = sum1 + z;
        Kind<T>::store(weights.data() + r * width + x, a, z);
      }
      const float part = at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, sum0 + sum1);
      if (started) {
        const float keep = std::exp(before - base);
        sum[r] = sum[r] * keep + part;
        if (keep != 1.f)
          for (float *x = acc.data() + r * wide, *end = x + wide; x < end; x += Vec::size())
            (Vec::loadu(x) * Vec(keep)).store(x);
      } else {
        sum[r] = part;
      }
      top[r] = now;
    }
    for (int64_t j = 0; j < blocks; ++j, started = true)
      product<T>(rows, d, n, width, d, wide, started, weights.data() + j * n, v + block(j) * n * d, acc.data());
  }

  // What is added to the logits of some blocks of keys, for mask, bias and ends. Returns whether anything is.
  bool add_to_keys(int64_t h, const int32_t* list, int64_t blocks) {
    const int64_t n = c.keys.block, cols = blocks * n;
    bool any = c.bias || c.exists || padded(cols) > cols;
    for (int64_t j = 0; j < blocks && !any; ++j) any = (list[j] + int64_t(1)) * n > c.keys.length;
    if (!any) return false;
    std::fill(extra.begin(), extra.end(), -kInf);
    for (int64_t j = 0; j < blocks; ++j)
      for (int64_t t = 0; t < n; ++t)
        if (const int64_t token = list[j] * n + t; attended(token, c.keys.length, c.exists))
          extra[j * n + t] = c.bias ? c.bias[h * c.bias_head + token] : 0.f;
    return true;
  }

  // The same for block j of the pooled keys: their weights, and nothing of blocks that are attended to or left out.
  void add_to_pooled(int64_t h, int64_t j) {
    const int64_t n = c.pooled.block, end = std::min(n, c.pooled.length - j * n);
    std::fill(extra.begin(), extra.end(), -kInf);
    for (int64_t t = 0; t < end; ++t)
      if (!taken[(j * n + t) / c.pooled_per_block]) extra[t] = c.weight[h * c.weight_head + j * n + t];
  }

  void run(int64_t h, int64_t u) {
    const int64_t g = h / (c.heads / c.groups), count = c.count[h * c.count_head + u];
    const int32_t* list = c.index + h * c.index_head + u * c.index_row;
    begin(h, u);
    for (int64_t first = 0; first < count; first += c.at_once) {
      const int64_t blocks = std::min(c.at_once, count - first);
      const bool altered = add_to_keys(h, list + first, blocks);
      absorb(c.keys, g, blocks, [&](int64_t j) { return int64_t(list[first + j]); }, altered);
    }
    if (c.pooled.blocks && !c.stats) {
      const uint8_t* out = c.left_out ? c.left_out + h * c.left_out_head + u * c.keys.blocks : nullptr;
      for (int64_t j = 0; j < c.keys.blocks; ++j) taken[j] = out ? out[j] : 0;
      for (int64_t j = 0; j < count; ++j) taken[list[j]] = 1;
      for (int64_t j = 0; j < c.pooled.blocks; ++j) {
        add_to_pooled(h, j);
        absorb(c.pooled, g, 1, [&](int64_t) { return j; }, true);
      }
    }
    write(h, u);
    if (c.stats) measure(h, u, g);
  }

  // The softmax weights of one block for all rows, by the log-sum-exp that the rows have now, and their sums.
  template <typename Store>
  void weigh(const T* k, int64_t n, bool altered, const float* lse, float* sums, Store store) {
    const int64_t width = padded(n);
    product<T>(rows, n, c.d, c.q_token, n, width, false, q, k, logits.data());
    const Vec scale(c.scale), none(0.f);
    for (int64_t r = 0; r < rows; ++r) {
      float* s = logits.data() + r * width;
      std::fill(s + n, s + width, 0.f);
      const Vec shift(lse[r] == -kInf ? 0.f : lse[r]);
      Vec total(0.f);
      for (int64_t x = 0; x < width; x += kStep) {
        Vec w[2];
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t at = x + i * Vec::size();
          const Vec more = altered ? Vec::loadu(extra.data() + at) : none;
          w[i] = Kind<T>::exp(at::vec::fmadd(Vec::loadu(s + at), scale, more) - shift);
          total = total + w[i];
        }
        store(r, x, w[0], w[1]);
      }
      if (sums) sums[r] = at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, total);
    }
  }

  // What every key block contributes to these rows: its mass, or the squared error of leaving it to its stand-ins.
  void measure(int64_t h, int64_t u, int64_t g) {
    const int64_t n = c.keys.block, d = c.d, wide = padded(d), width = padded(n), all = c.pooled.blocks * c.pooled.block;
    float *mass = sum.data(), *lse = c.lse + h * c.sq + u * c.q_block;
    for (int64_t r = 0; r < rows; ++r) {
      const float share = sum[r] == 0.f ? 0.f : 1.f / sum[r];
      for (float *x = acc.data() + r * wide, *end = x + wide; x < end; ++x) *x *= share;
    }
    for (int64_t j = 0; j < c.pooled.blocks; ++j) {
      const int64_t block = c.pooled.block;
      std::fill(taken.begin(), taken.end(), 0);
      add_to_pooled(h, j);
      const T* k = static_cast<const T*>(c.pooled.packed_k) + (g * c.pooled.blocks + j) * block * d;
      weigh(k, block, true, lse, nullptr, [&](int64_t r, int64_t x, Vec a, Vec z) {
        float w[kStep];
        a.store(w);
        z.store(w + Vec::size());
        std::copy_n(w, std::min(kStep, block - x), stand.data() + r * all + j * block + x);
      });
    }
    for (int64_t j = 0; j < c.keys.blocks; ++j) {
      const int32_t block = j;
      const T* k = static_cast<const T*>(c.keys.packed_k) + (g * c.keys.blocks + j) * n * d;
      const T* v = static_cast<const T*>(c.keys.packed_v) + (g * c.keys.blocks + j) * n * d;
      const bool altered = add_to_keys(h, &block, 1);
      weigh(k, n, altered, lse, mass, [&](int64_t r, int64_t x, Vec a, Vec z) {
        Kind<T>::store(weights.data() + r * width + x, a, z);
      });
      float* to = c.stats + (h * c.nq + u) * c.keys.blocks + j;
      double total = 0;
      if (!c.errors) {
        for (int64_t r = 0; r < rows; ++r) total += lse[r] == -kInf ? 0.f : mass[r];
        *to = total;
        continue;
      }
      product<T>(rows, d, n, width, d, wide, false, weights.data(), v, part.data());
      const int64_t low = j * c.pooled_per_block, high = std::min(low + c.pooled_per_block, c.pooled.length);
      for (int64_t r = 0; r < rows; ++r) {
        if (lse[r] == -kInf) continue;
        const float* own = stand.data() + r * all;
        float left = mass[r];
        for (int64_t p = low; p < high; ++p) left -= own[p];
        Vec square(0.f);
        for (int64_t x = 0; x < wide; x += Vec::size()) {
          Vec off = Vec::loadu(part.data() + r * wide + x) - Vec(left) * Vec::loadu(acc.data() + r * wide + x);
          for (int64_t p = low; p < high; ++p)
            off = off - Vec(own[p]) * Vec::loadu(c.stand_in + g * c.stand_in_head + p * c.stand_in_token + x);
          square = at::vec::fmadd(off, off, square);
        }
        total += at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, square);
      }
      *to = total;
    }
  }

  void write(int64_t h, int64_t u) {
    const int64_t wide = padded(c.d);
    T* out = static_cast<T*>(c.out) + h * c.out_head + u * c.q_block * c.out_token;
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = acc.data() + r * wide;
      const Vec share(sum[r] == 0.f ? 0.f : 1.f / sum[r]);
      for (int64_t x = 0; x < wide; x += kStep)
        Kind<T>::store(row.data() + x, Vec::loadu(from + x) * share, Vec::loadu(from + x + Vec::size()) * share);
      std::memcpy(out + r * c.out_token, row.data(), c.d * sizeof(T));
      c.lse[h * c.sq + u * c.q_block + r] = std::log(sum[r]) + top[r];
    }
  }
};

template <typename T>
void pack(const Call& c) {
  const int64_t each = c.keys.blocks + c.pooled.blocks;
  for (int64_t i; (i = c.next->fetch_add(1)) < c.groups * each;) {
    const bool own = i % each < c.keys.blocks;
    const Keys& keys = own ? c.keys : c.pooled;
    const int64_t g = i / each, j = own ? i % each : i % each - c.keys.blocks;
    pack_keys<T>(keys, own ? c.exists : nullptr, c.d, g, j);
    pack_values<T>(keys, own ? c.exists : nullptr, c.d, g, j);
  }
}

template <typename T>
void attend(const Call& c) {
  Tile<T> tile(c);
  for (int64_t i; (i = c.next->fetch_add(1)) < c.heads * c.nq;) tile.run(i / c.nq, i % c.nq);
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

// Calls run() on so many threads, side by side.
template <typename F>
void on_threads(int threads, F& run) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));  // torch has loaded it
  if (threads == 1) return run();
  if (parallel) return parallel([](void* data) { (*static_cast<F*>(data))(); }, &run, threads, 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&] { run(); });
  run();
  for (auto& each : others) each.join();
}

// Runs work(call) on all threads, and returns the worst of what guarded() says of them.
template <typename F>
int shared(const Call& call, int threads, F work) {
  std::atomic<int> state{0};
  call.next->store(0);
  auto run = [&] {
    const int mine = guarded([&] { work(call); });
    for (int seen = state; mine > seen && !state.compare_exchange_weak(seen, mine);) {
    }
  };
  on_threads(threads, run);
  return state;
}

template <typename T>
int compute(const Call& call, int threads) {
  const int packed = shared(call, threads, pack<T>);
  return packed ? packed : shared(call, threads, attend<T>);
}

}  // namespace

extern "C" {

int dit_attn_compute(const Call* call, int bf16, int threads) {
  return bf16 ? compute<at::BFloat16>(*call, threads) : compute<float>(*call, threads);
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
