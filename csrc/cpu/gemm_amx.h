// gemm on tile registers (AMX), for gemm.cpp.
#pragma once

#include "gemm.h"
#include "simd.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

// A tile register holds 16 rows of 64 bytes. Weights are read in place, 16 rows of 32 elements; operands in tiles of
// 32 elements x 16 rows. Each instruction adds 16 x 16 sums, so that up to 16 operand rows cost what one does.
constexpr int kTile = 16, kTileDepth = 32;
constexpr std::int64_t kTileBytes = 1024, kTileFloats = kTileBytes / 4;

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

// The address of a tile, and the bytes between its rows.
struct TileAt {
  const void* data;
  std::int64_t stride;
};
using TileCopy = bf16[kTile][kTileDepth];

// 16 rows of 32 weights in place; or a copy with zeros behind the last row and behind a row's end.
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
inline void transpose_sums(const float* tile, const Weight& weight, const Result& y, std::int64_t row, std::int64_t rows,
                           __m512 out[16]) {
  const __mmask16 there = static_cast<__mmask16>((1u << rows) - 1);
  for (int i = 0; i < kTile; ++i) out[i] = _mm512_load_ps(tile + i * kTile);
  transpose(out);
  const __m512 scale = weight.scales ? _mm512_maskz_loadu_ps(there, weight.scales + row) : all(1.0f);
  const __m512 bias = bias_of(y, row, rows);
  for (int i = 0; i < kTile; ++i) out[i] = fma(out[i], scale, bias);
}

template <typename W>
void gemm_amx(const Weight& weight, const Operand& x, const Result& y, const Worker& worker) {
  const std::int64_t n = x.cols, depth = padded(n) / kTileDepth, groups = (x.rows + kTile - 1) / kTile;
  const std::int64_t outputs = weight.rows / (y.gated ? 2 : 1), take = y.gated ? kTile : 2 * kTile;
  alignas(64) TileCopy copy_a, copy_b;
  const TileConfig config;
  _tile_loadconfig(&config);
  WorkQueue queue(worker, outputs, take);
  for (Range part; queue.next(&part);)
    for (std::int64_t o = part.begin; o < part.end; o += take) {
      const std::int64_t left = part.end - o;
      // The two weight tiles: gate and up, or a tile of outputs and the one behind it.
      const std::int64_t second = y.gated ? o + outputs : o + kTile;
      const std::int64_t rows_a = left < kTile ? left : kTile;
      const std::int64_t rows_b = y.gated ? rows_a : left - rows_a < kTile ? left - rows_a : kTile;
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
          if (g == 0) {  // of the rows behind these, the part that is read of these
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
          transpose_sums(sums[2 * j], weight, y, o, rows_a, first);
          if (rows_b) transpose_sums(sums[2 * j + 1], weight, y, second, rows_b, other);
          if (y.gated)
            for (int i = 0; i < kTile; ++i)
              first[i] = mul(silu(first[i]), other[i]);
          for (int half = 0; half <= (rows_b && !y.gated ? 1 : 0); ++half) {
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

// Writes this worker's part of an operand in tiles from rows of `stride` floats.
inline void fill_amx_tiles(const Operand& operand, const float* x, std::int64_t stride, const Worker& worker) {
  const std::int64_t depth = padded(operand.cols) / kTileDepth, groups = (operand.rows + kTile - 1) / kTile;
  const Range mine = worker.partition(groups * depth);
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
}

}  // namespace
}  // namespace LATENTMAS_ISA
}  // namespace latentmas
