#include "product.h"

#include "simd.h"

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
// Rows of a weight that a member's part is counted in.
constexpr std::int64_t kUnit = 16;
// Bytes ahead that are prefetched: the next block of rows where that fits the first cache beside this one.
constexpr std::int64_t kBlockBytes = 32 * 1024, kAheadBytes = 2048;
// Bytes of the next product that are asked for before a barrier.
constexpr std::int64_t kEarlyBytes = 16 * 1024;

inline void load_two(const bf16* p, Vec* a, Vec* b) { load_pairs(p, a, b); }
template <typename W>
inline void load_two(const W* p, Vec* a, Vec* b) {
  *a = load(p);
  *b = load(p + kLanes);
}

// out[r * C + c] = weight row r . operand row c.
template <typename W, int R, int C>
void dots(const W* weight, std::int64_t n, const float* x, std::int64_t x_stride, std::int64_t ahead, float* out) {
  Vec sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = zero();
  std::int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int r = 0; r < R; ++r) {
      const W* w = weight + r * n + i;
      if (ahead)
        for (std::size_t byte = 0; byte < kStep * sizeof(W); byte += 64)
          prefetch(reinterpret_cast<const char*>(w) + ahead + byte);
      Vec a, b;
      load_two(w, &a, &b);
      for (int c = 0; c < C; ++c) {
        sums[r][c] = fma(a, load(x + c * x_stride + i), sums[r][c]);
        sums[r][c] = fma(b, load(x + c * x_stride + i + kLanes), sums[r][c]);
      }
    }
  }
  if (i < n) {  // the operand is padded with zeros, the weight is not
    for (int r = 0; r < R; ++r) {
      W rest[kStep] = {};
      for (std::int64_t j = i; j < n; ++j) rest[j - i] = weight[r * n + j];
      Vec a, b;
      load_two(rest, &a, &b);
      for (int c = 0; c < C; ++c) {
        sums[r][c] = fma(a, load(x + c * x_stride + i), sums[r][c]);
        sums[r][c] = fma(b, load(x + c * x_stride + i + kLanes), sums[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r * C + c] = sum(sums[r][c]);
}

template <typename W, int C>
void block(const W* weight, std::int64_t rows, std::int64_t n, const float* x, std::int64_t x_stride, std::int64_t ahead,
           float* out) {
  if (rows == kBlockRows) return dots<W, kBlockRows, C>(weight, n, x, x_stride, ahead, out);
  for (std::int64_t r = 0; r < rows; ++r) dots<W, 1, C>(weight + r * n, n, x, x_stride, ahead, out + r * C);
}

template <typename W>
void block(const W* weight, std::int64_t rows, std::int64_t n, const float* x, std::int64_t x_stride, std::int64_t cols,
           std::int64_t ahead, float* out) {
  static_assert(kBlockCols == 3, "a case for each number of columns");
  if (cols == 3) return block<W, 3>(weight, rows, n, x, x_stride, ahead, out);
  if (cols == 2) return block<W, 2>(weight, rows, n, x, x_stride, ahead, out);
  block<W, 1>(weight, rows, n, x, x_stride, ahead, out);
}

inline float silu(float x) { return x / (1.0f + __builtin_expf(-x)); }

inline float bias_at(const Result& y, std::int64_t i) {
  if (!y.bias) return 0.0f;
  return y.bias_dtype == DType::f32 ? static_cast<const float*>(y.bias)[i]
                                    : to_float(static_cast<const bf16*>(y.bias)[i]);
}

// Rows of one matrix of the weight, times all rows of the operand.
template <typename W>
void product_rows(const Weight& weight, const Operand& x, const Result& y, const Member& me) {
  const std::int64_t n = x.cols, stride = padded(n), outputs = weight.rows / (y.pair ? 2 : 1);
  const Range mine = me.share(outputs, kUnit);
  const W* first = static_cast<const W*>(weight.data);
  const std::int64_t row_bytes = n * static_cast<std::int64_t>(sizeof(W));
  const std::int64_t ahead = kBlockRows * row_bytes <= kBlockBytes ? kBlockRows * row_bytes : kAheadBytes;
  for (std::int64_t o = mine.begin; o < mine.end; o += kBlockRows) {
    const std::int64_t rows = mine.end - o < kBlockRows ? mine.end - o : kBlockRows;
    for (std::int64_t c = 0; c < x.rows; c += kBlockCols) {
      const std::int64_t cols = x.rows - c < kBlockCols ? x.rows - c : kBlockCols;
      const float* operand = x.data + c * stride;
      float out[2][kBlockRows * kBlockCols];
      for (int half = 0; half <= (y.pair ? 1 : 0); ++half) {
        const std::int64_t row = o + half * outputs;
        block(first + row * n, rows, n, operand, stride, cols, c ? 0 : ahead, out[half]);
        for (std::int64_t r = 0; r < rows; ++r) {
          const float scale = weight.scales ? weight.scales[row + r] : 1.0f, bias = bias_at(y, row + r);
          for (std::int64_t j = 0; j < cols; ++j) out[half][r * cols + j] = out[half][r * cols + j] * scale + bias;
        }
      }
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t j = 0; j < cols; ++j) {
          float value = out[0][r * cols + j];
          if (y.pair) value = silu(value) * out[1][r * cols + j];
          float* to = y.data + (c + j) * y.stride + o + r;
          *to = y.add ? *to + value : value;
        }
    }
  }
}

#if defined(LATENTMAS_TILES)

// A tile register holds 16 rows of 64 bytes. Weights are taken as they lie, 16 rows of 32 elements; operands in tiles of
// 32 elements x 16 rows. Each instruction adds 16 x 16 sums, so that up to 16 operand rows cost what one does.
constexpr int kTile = 16, kTileDepth = 32;
constexpr std::int64_t kTileBytes = 1024, kTileFloats = kTileBytes / 4;
// Operand rows from which tiles are taken. Below, a step waits for memory all the same, and activations stay float32.
constexpr std::int64_t kTileRows = 5;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = 64;
      rows[i] = kTile;
    }
  }
};

inline void transpose(__m512 r[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    t[i + 2] = _mm512_unpacklo_ps(r[i + 2], r[i + 3]);
    t[i + 3] = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Where a tile is to be loaded from, and the bytes between its rows.
struct TileAt {
  const void* data;
  std::int64_t stride;
};
using TileCopy = bf16[kTile][kTileDepth];

// 16 rows of 32 weights, where they lie; or a copy, in which what is not there (behind the last row, behind a row's end) is
// zero.
inline TileAt tile_at(const bf16* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, TileCopy copy) {
  if (rows == kTile && cols == kTileDepth) return {from, stride * 2};
  std::memset(copy, 0, kTileBytes);
  for (std::int64_t r = 0; r < rows; ++r) std::memcpy(copy[r], from + r * stride, cols * sizeof(bf16));
  return {copy, 64};
}
// int8 becomes bf16 on the way, which holds every one of its values.
inline TileAt tile_at(const int8* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, TileCopy copy) {
  if (rows < kTile) std::memset(copy, 0, kTileBytes);
  for (std::int64_t r = 0; r < rows; ++r) {
    const int8* row = from + r * stride;
    const __m512 low = load_first(row, cols), high = cols > kLanes ? load_first(row + kLanes, cols - kLanes) : zero();
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(copy[r], &both, sizeof both);
  }
  return {copy, 64};
}

// One stored tile of sums, weight rows x operand rows, becomes operand rows of kTile outputs.
inline void take_sums(const float* tile, const Weight& weight, const Result& y, std::int64_t row, std::int64_t rows,
                      __m512 out[16]) {
  const __mmask16 there = static_cast<__mmask16>((1u << rows) - 1);
  for (int i = 0; i < kTile; ++i) out[i] = _mm512_load_ps(tile + i * kTile);
  transpose(out);
  const __m512 scale = weight.scales ? _mm512_maskz_loadu_ps(there, weight.scales + row) : all(1.0f);
  alignas(64) float bias[kTile] = {};
  for (std::int64_t i = 0; y.bias && i < rows; ++i) bias[i] = bias_at(y, row + i);
  for (int i = 0; i < kTile; ++i) out[i] = fma(out[i], scale, load(bias));
}

template <typename W>
void product_tiles(const Weight& weight, const Operand& x, const Result& y, const Member& me) {
  const std::int64_t n = x.cols, depth = padded(n) / kTileDepth, groups = (x.rows + kTile - 1) / kTile;
  const std::int64_t outputs = weight.rows / (y.pair ? 2 : 1), take = y.pair ? kTile : 2 * kTile;
  const Range mine = me.share(outputs, kUnit);
  alignas(64) TileCopy copy_a, copy_b;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (std::int64_t o = mine.begin; o < mine.end; o += take) {
    // The two weight tiles: gate and up, or a tile of outputs and the one behind it.
    const std::int64_t second = y.pair ? o + outputs : o + kTile;
    const std::int64_t left = mine.end - o;
    const std::int64_t rows_a = left < kTile ? left : kTile;
    const std::int64_t rows_b = y.pair ? rows_a : left - rows_a < kTile ? left - rows_a : kTile;
    const W* a = static_cast<const W*>(weight.data) + o * n;
    const W* b = static_cast<const W*>(weight.data) + (rows_b ? second : o) * n;
    for (std::int64_t g = 0; g < groups; g += 2) {
      const bool two = g + 1 < groups;
      const float* operand = x.data + g * depth * kTileFloats;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (std::int64_t k = 0; k < depth; ++k) {
        const std::int64_t left_cols = n - k * kTileDepth, cols = left_cols < kTileDepth ? left_cols : kTileDepth;
        if (g == 0) {  // of the rows behind these, as much as is read of these
          const char* next[2] = {reinterpret_cast<const char*>(a + take * n), reinterpret_cast<const char*>(b + take * n)};
          for (int half = 0; half < 2; ++half)
            for (std::size_t line = 0; line < kTile * kTileDepth * sizeof(W); line += 64)
              prefetch(next[half] + k * kTile * kTileDepth * sizeof(W) + line);
        }
        _tile_loadd(6, operand + k * kTileFloats, 64);
        const TileAt at_a = tile_at(a + k * kTileDepth, rows_a, cols, n, copy_a);
        _tile_loadd(4, at_a.data, at_a.stride);
        _tile_dpbf16ps(0, 4, 6);
        if (rows_b) {
          const TileAt at_b = tile_at(b + k * kTileDepth, rows_b, cols, n, copy_b);
          _tile_loadd(5, at_b.data, at_b.stride);
          _tile_dpbf16ps(1, 5, 6);
        }
        if (two) {
          _tile_loadd(7, operand + (depth + k) * kTileFloats, 64);
          _tile_dpbf16ps(2, 4, 7);
          if (rows_b) _tile_dpbf16ps(3, 5, 7);
        }
      }
      alignas(64) float sums[4][kTileFloats];
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      for (int j = 0; j <= (two ? 1 : 0); ++j) {
        const std::int64_t c = (g + j) * kTile, cols = x.rows - c < kTile ? x.rows - c : kTile;
        __m512 first[16], other[16];
        take_sums(sums[2 * j], weight, y, o, rows_a, first);
        if (rows_b) take_sums(sums[2 * j + 1], weight, y, second, rows_b, other);
        if (y.pair)
          for (int i = 0; i < kTile; ++i)
            first[i] = mul(div(first[i], add(all(1.0f), exp(mul(first[i], all(-1.0f))))), other[i]);
        for (int half = 0; half <= (rows_b && !y.pair ? 1 : 0); ++half) {
          const __mmask16 there = static_cast<__mmask16>((1u << (half ? rows_b : rows_a)) - 1);
          for (std::int64_t i = 0; i < cols; ++i) {
            float* to = y.data + (c + i) * y.stride + o + half * kTile;
            __m512 value = half ? other[i] : first[i];
            if (y.add) value = add(value, _mm512_maskz_loadu_ps(there, to));
            _mm512_mask_storeu_ps(to, there, value);
          }
        }
      }
    }
  }
  _tile_release();
}

#endif

}  // namespace

Layout layout_for(const Weight& weight, std::int64_t rows) {
  (void)rows;
#if defined(LATENTMAS_TILES)
  if (weight.dtype != DType::f32 && rows >= kTileRows) return Layout::tiles;
#endif
  return weight.dtype == DType::bf16 ? Layout::pairs : Layout::rows;
}

void pack_row(const Operand& operand, std::int64_t r, const float* x) {
  const std::int64_t n = operand.cols, stride = padded(n);
  float* to = operand.data + r * stride;
  std::int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    Vec a, b;
    if (operand.layout == Layout::pairs)
      split_pairs(x + i, &a, &b);
    else
      load_two(x + i, &a, &b);
    store(to + i, a);
    store(to + i + kLanes, b);
  }
  std::memset(to + i, 0, (stride - i) * sizeof(float));
  for (; i < n; ++i) {
    const std::int64_t step = i / kStep * kStep, at = i - step;
    to[operand.layout == Layout::pairs ? step + at % 2 * kLanes + at / 2 : i] = x[i];
  }
}

void pack_tiles(const Operand& operand, const float* x, std::int64_t stride, const Member& me) {
#if defined(LATENTMAS_TILES)
  const std::int64_t depth = padded(operand.cols) / kTileDepth, groups = (operand.rows + kTile - 1) / kTile;
  const Range mine = me.share(groups * depth);
  for (std::int64_t tile = mine.begin; tile < mine.end; ++tile) {
    const std::int64_t r = tile / depth * kTile, k = tile % depth * kTileDepth, cols = operand.cols - k;
    __m512 rows[16];
    for (int i = 0; i < kTile; ++i) {
      rows[i] = zero();
      if (r + i >= operand.rows) continue;
      const float* from = x + (r + i) * stride + k;
      const __m512 high = cols > kLanes ? load_first(from + kLanes, cols - kLanes) : zero();
      const __m512bh both = _mm512_cvtne2ps_pbh(high, load_first(from, cols));
      std::memcpy(&rows[i], &both, sizeof both);
    }
    transpose(rows);
    for (int i = 0; i < kTile; ++i) store(operand.data + tile * kTileFloats + i * kTile, rows[i]);
  }
#else
  (void)operand, (void)x, (void)stride, (void)me;
#endif
}

void product(const Weight& weight, const Operand& x, const Result& y, const Member& me) {
#if defined(LATENTMAS_TILES)
  if (x.layout == Layout::tiles) {
    if (weight.dtype == DType::bf16) return product_tiles<bf16>(weight, x, y, me);
    return product_tiles<int8>(weight, x, y, me);
  }
#endif
  if (weight.dtype == DType::f32) return product_rows<float>(weight, x, y, me);
  if (weight.dtype == DType::bf16) return product_rows<bf16>(weight, x, y, me);
  product_rows<int8>(weight, x, y, me);
}

void prefetch_weight(const Weight& weight, bool pair, const Member& me) {
  const std::int64_t outputs = weight.rows / (pair ? 2 : 1);
  const std::int64_t bytes = weight.cols * (weight.dtype == DType::f32 ? 4 : weight.dtype == DType::bf16 ? 2 : 1);
  const char* mine = static_cast<const char*>(weight.data) + me.share(outputs, kUnit).begin * bytes;
  for (std::int64_t i = 0; i < kEarlyBytes; i += 64) prefetch(mine + i);
}

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
