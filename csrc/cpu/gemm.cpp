#include "gemm.h"

#if defined(LATENTMAS_AMX)
#include "gemm_amx.h"
#elif defined(__AVX512BF16__)
#define LATENTMAS_BF16_DOT 1
#endif

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

constexpr int kStep = 2 * kLanes;
static_assert(kPad % kStep == 0, "operands are padded to whole steps");

// Weight rows x operand rows that are multiplied at once: as many sums as there are registers for. Each sum goes over the
// elements in the same order whatever the block, so a row's result does not depend on the rows beside it.
#if defined(__AVX512F__)
constexpr int kBlockRows = 8, kBlockCols = 3;
#else
constexpr int kBlockRows = 4, kBlockCols = 3;
#endif
static_assert(kBlockRows <= kLanes && kBlockRows <= kMaxBlockRows, "a block's outputs are one vector");
// Operand rows from which a product in a bf16 model rounds its operand to bf16, as transformers does. Below, a step waits
// for memory all the same, and activations stay float32.
[[maybe_unused]] constexpr std::int64_t kBf16OperandRows = 5;
// Bytes ahead that are prefetched: the next block of rows where that fits the first cache beside this one.
constexpr std::int64_t kBlockBytes = 16 * 1024, kNearBytes = 4096;

inline void load_two(const bf16* p, Vec* a, Vec* b) { load_even_odd(p, a, b); }
template <typename W>
inline void load_two(const W* p, Vec* a, Vec* b) {
  *a = load(p);
  *b = load(p + kLanes);
}

// sums[c] += kStep elements of a weight row times those of operand row c.
template <typename W, int C>
inline void multiply(const W* weight, const float* x, std::int64_t x_stride, Vec (&sums)[C]) {
  Vec a, b;
  load_two(weight, &a, &b);
  for (int c = 0; c < C; ++c) {
    sums[c] = fma(a, load(x + c * x_stride), sums[c]);
    sums[c] = fma(b, load(x + c * x_stride + kLanes), sums[c]);
  }
}
#if defined(LATENTMAS_BF16_DOT)
template <int C>
inline void multiply(const bf16* weight, const bf16* x, std::int64_t x_stride, Vec (&sums)[C]) {
  const Bf16Vec a = load_bf16(weight);
  for (int c = 0; c < C; ++c) sums[c] = dot(a, load_bf16(x + c * x_stride), sums[c]);
}
#endif

// The prefetches of a pass over a block of rows: in every `passes`-th step the lines so many bytes behind those of that step.
// The passes for the columns of an operand share the block that comes next: asked for by the first alone, the memory would
// be idle during the others.
struct Fetch {
  std::int64_t bytes;
  int passes, first;  // the first step that does; none where passes is 0
};

// out[c * kLanes + r] = weight row r . operand row c.
template <int R, int C, typename W, typename X>
void dots(const W* weight, std::int64_t n, const X* x, std::int64_t x_stride, const Fetch& fetch, float* out) {
  Vec sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = zero();
  std::int64_t i = 0;
  int until = fetch.first + 1;
  for (; i + kStep <= n; i += kStep) {
    if (fetch.passes && --until == 0) {
      until = fetch.passes;
      const bool begins_line = kStep * sizeof(W) >= 64 || i * sizeof(W) % 64 == 0;
      for (int r = 0; begins_line && r < R; ++r)
        for (std::size_t byte = 0; byte < kStep * sizeof(W); byte += 64)
          prefetch(reinterpret_cast<const char*>(weight + r * n + i) + fetch.bytes + byte, fetch.passes == 1);
    }
    for (int r = 0; r < R; ++r) multiply(weight + r * n + i, x + i, x_stride, sums[r]);
  }
  if (i < n)  // the operand is padded with zeros, the weight is not
    for (int r = 0; r < R; ++r) {
      W rest[kStep] = {};
      for (std::int64_t j = i; j < n; ++j) rest[j - i] = weight[r * n + j];
      multiply(rest, x + i, x_stride, sums[r]);
    }
  for (int c = 0; c < C; ++c) {
    if constexpr (R == kBlockRows) {
      Vec column[R];
      for (int r = 0; r < R; ++r) column[r] = sums[r][c];
      sums_of(column, out + c * kLanes);
    } else {
      for (int r = 0; r < R; ++r) out[c * kLanes + r] = sum(sums[r][c]);
    }
  }
}

template <int C, typename W, typename X>
void block(const W* weight, std::int64_t rows, std::int64_t n, const X* x, std::int64_t x_stride, const Fetch& fetch,
           float* out) {
  if (rows == kBlockRows) return dots<kBlockRows, C>(weight, n, x, x_stride, fetch, out);
  for (std::int64_t r = 0; r < rows; ++r) dots<1, C>(weight + r * n, n, x, x_stride, Fetch{}, out + r);
}

template <typename W, typename X>
void block(const W* weight, std::int64_t rows, std::int64_t n, const X* x, std::int64_t x_stride, std::int64_t cols,
           const Fetch& fetch, float* out) {
  static_assert(kBlockCols == 3, "a case for each number of columns");
  if (cols == 3) return block<3>(weight, rows, n, x, x_stride, fetch, out);
  if (cols == 2) return block<2>(weight, rows, n, x, x_stride, fetch, out);
  block<1>(weight, rows, n, x, x_stride, fetch, out);
}

// The rows of a block as the operand's type wants them: in place, or rounded into `space`.
template <typename W>
struct WeightRows {
  const W* data;
  std::int64_t stride;
  bool in_place;  // not in `space`
};
template <typename W, typename X>
inline WeightRows<W> weight_rows_for(const X*, const W* from, std::int64_t, std::int64_t n, std::int64_t, void*) {
  return {from, n, true};
}
#if defined(LATENTMAS_BF16_DOT)
inline WeightRows<bf16> weight_rows_for(const bf16*, const int8* from, std::int64_t rows, std::int64_t n, std::int64_t ahead,
                                        void* space) {
  bf16* to = static_cast<bf16*>(space);
  const std::int64_t stride = padded(n);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i < n; i += kStep) {
      const int8* p = from + r * n + i;
      if (i % 64 == 0) prefetch(p + ahead);
      const std::int64_t left = n - i;
      store_bf16(to + r * stride + i, load_first(p, left), left > kLanes ? load_first(p + kLanes, left - kLanes) : zero());
    }
  return {to, stride, false};
}
#endif

// Outputs of rows [row, row + count) for one operand row, from their sums.
inline Vec scale_and_bias(const Weight& weight, const Result& y, const float* sums, std::int64_t row, std::int64_t count) {
  const Vec scale = weight.scales ? load_first(weight.scales + row, count) : all(1.0f);
  return fma(load(sums), scale, bias_of(y, row, count));
}

template <typename W, typename X>
void gemm_rows(const Weight& weight, const Operand& operand, const Result& y, const Worker& worker, void* space) {
  const std::int64_t n = operand.cols, stride = padded(n), outputs = weight.rows / (y.gated ? 2 : 1);
  const W* first = static_cast<const W*>(weight.data);
  const X* x = reinterpret_cast<const X*>(operand.data);
  const std::int64_t row_bytes = n * static_cast<std::int64_t>(sizeof(W));
  const std::int64_t ahead = kBlockRows * row_bytes <= kBlockBytes ? kBlockRows * row_bytes : kNearBytes;
  const int passes = operand.rows > kBlockRows * kBlockCols ? kBlockRows : (operand.rows + kBlockCols - 1) / kBlockCols;
  alignas(64) float sums[2][kBlockCols * kLanes] = {};
  WorkQueue queue(worker, outputs, kUnit);
  for (Range part; queue.next(&part);)
    for (std::int64_t o = part.begin; o < part.end; o += kBlockRows) {
      const std::int64_t rows = part.end - o < kBlockRows ? part.end - o : kBlockRows;
      const auto a = weight_rows_for(x, first + o * n, rows, n, ahead, space);
      const auto b = y.gated ? weight_rows_for(x, first + (o + outputs) * n, rows, n, ahead,
                                               static_cast<bf16*>(space) + kBlockRows * stride)
                             : a;
      for (std::int64_t c = 0; c < operand.rows; c += kBlockCols) {
        const std::int64_t cols = operand.rows - c < kBlockCols ? operand.rows - c : kBlockCols, pass = c / kBlockCols;
        const Fetch fetch{ahead, a.in_place && pass < passes ? passes : 0, static_cast<int>(pass)};
        block(a.data, rows, a.stride, x + c * stride, stride, cols, fetch, sums[0]);
        if (y.gated) block(b.data, rows, b.stride, x + c * stride, stride, cols, fetch, sums[1]);
        for (std::int64_t j = 0; j < cols; ++j) {
          Vec value = scale_and_bias(weight, y, sums[0] + j * kLanes, o, rows);
          if (y.gated) value = mul(silu(value), scale_and_bias(weight, y, sums[1] + j * kLanes, o + outputs, rows));
          float* to = y.data + (c + j) * y.stride + o;
          store_first(to, y.add ? add(value, load_first(to, rows)) : value, rows);
        }
      }
    }
}

}  // namespace

Layout layout_for(const Weight& weight, std::int64_t rows, DType model) {
#if defined(LATENTMAS_AMX)
  if (model == DType::bf16 && weight.dtype != DType::f32 && rows >= kBf16OperandRows) return Layout::amx_tiles;
#elif defined(LATENTMAS_BF16_DOT)
  if (model == DType::bf16 && weight.dtype != DType::f32 && rows >= kBf16OperandRows) return Layout::bf16;
#else
  (void)rows, (void)model;
#endif
  return weight.dtype == DType::bf16 ? Layout::even_odd : Layout::rows;
}

void pack_row(const Operand& operand, std::int64_t r, const float* x) {
  const std::int64_t n = operand.cols, stride = padded(n);
#if defined(LATENTMAS_BF16_DOT)
  if (operand.layout == Layout::bf16) {
    bf16* to = reinterpret_cast<bf16*>(operand.data) + r * stride;
    for (std::int64_t i = 0; i < n; i += kStep)
      store_bf16(to + i, load_first(x + i, n - i), n - i > kLanes ? load_first(x + i + kLanes, n - i - kLanes) : zero());
    return;
  }
#endif
  float* to = operand.data + r * stride;
  std::int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    Vec a, b;
    if (operand.layout == Layout::even_odd)
      split_even_odd(x + i, &a, &b);
    else
      load_two(x + i, &a, &b);
    store(to + i, a);
    store(to + i + kLanes, b);
  }
  std::memset(to + i, 0, (stride - i) * sizeof(float));
  for (; i < n; ++i) {
    const std::int64_t step = i / kStep * kStep, at = i - step;
    to[operand.layout == Layout::even_odd ? step + at % 2 * kLanes + at / 2 : i] = x[i];
  }
}

void pack_amx_tiles(const Operand& operand, const float* x, std::int64_t stride, const Worker& worker) {
#if defined(LATENTMAS_AMX)
  fill_amx_tiles(operand, x, stride, worker);
#else
  (void)operand, (void)x, (void)stride, (void)worker;
#endif
}

void gemm(const Weight& weight, const Operand& x, const Result& y, const Worker& worker, void* space) {
#if defined(LATENTMAS_AMX)
  if (x.layout == Layout::amx_tiles) {
    if (weight.dtype == DType::bf16) return gemm_amx<bf16>(weight, x, y, worker);
    return gemm_amx<int8>(weight, x, y, worker);
  }
#elif defined(LATENTMAS_BF16_DOT)
  if (x.layout == Layout::bf16) {
    if (weight.dtype == DType::bf16) return gemm_rows<bf16, bf16>(weight, x, y, worker, space);
    return gemm_rows<int8, bf16>(weight, x, y, worker, space);
  }
#endif
  if (weight.dtype == DType::f32) return gemm_rows<float, float>(weight, x, y, worker, space);
  if (weight.dtype == DType::bf16) return gemm_rows<bf16, float>(weight, x, y, worker, space);
  gemm_rows<int8, float>(weight, x, y, worker, space);
}

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
