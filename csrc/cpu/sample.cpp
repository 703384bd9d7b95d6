#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace latentmas {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kFirstLook = 1024;  // most distributions have their top-p mass in fewer tokens

// Philox 4x32-10, its first number as one in [0, 1).
double philox_uniform(std::uint64_t seed, std::uint32_t counter) {
  std::uint32_t c[4] = {counter, 0, 0, 0};
  std::uint32_t k[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const std::uint32_t next[4] = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(b),
                                   static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(a)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  const std::int32_t number = static_cast<std::int32_t>(c[0]);
  return (number < 0 ? -(number + 1) : number) * 4.6566127342e-10;
}

// Sixteen at a time, which the compiler turns into vectors: 50,000 logits took 45 us one by one.
float largest(const float* values, std::int64_t count) {
  constexpr int kLanes = 16;
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, kNever);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
  for (; i < count; ++i) lanes[0] = std::max(lanes[0], values[i]);
  return *std::max_element(lanes, lanes + kLanes);
}

// The smallest logit that top-p keeps: one stays while the mass strictly above it is below top_p of the whole.
float top_p_floor(std::vector<float>& z, double top, double top_p) {
  double whole = 0;
  for (const float value : z) whole += std::exp(value - top);
  std::size_t look = kFirstLook, sorted = 0;
  double above = 0;
  while (sorted < z.size()) {
    const std::size_t stop = std::min(z.size(), look);
    if (stop < z.size()) std::nth_element(z.begin() + sorted, z.begin() + stop - 1, z.end(), std::greater<float>());
    std::sort(z.begin() + sorted, z.begin() + stop, std::greater<float>());
    for (; sorted < stop; ++sorted) {
      // `above` is the mass of all before; equals of the first that stays stay with it.
      if (sorted > 0 && z[sorted] != z[sorted - 1] && !(above < top_p * whole)) return z[sorted - 1];
      above += std::exp(z[sorted] - top);
    }
    look *= 8;
  }
  return z.back();
}

}  // namespace

std::int64_t sample(const float* logits, std::int64_t vocabulary, const Sampling& how, std::uint32_t counter,
                    const std::vector<std::int64_t>& suppressed, std::vector<float>& scratch) {
  if (!how.draw && suppressed.empty()) return std::find(logits, logits + vocabulary, largest(logits, vocabulary)) - logits;
  std::vector<float>& z = scratch;
  z.assign(logits, logits + vocabulary);
  for (const std::int64_t token : suppressed)
    if (token >= 0 && token < vocabulary) z[token] = kNever;
  if (!how.draw) return std::find(z.begin(), z.end(), largest(z.data(), vocabulary)) - z.begin();
  for (float& value : z) value /= how.temperature;
  const float top = largest(z.data(), vocabulary);
  float floor = kNever;
  std::vector<float> kept;
  if (how.top_k > 0 && how.top_k < vocabulary) {
    kept = z;
    std::nth_element(kept.begin(), kept.begin() + how.top_k - 1, kept.end(), std::greater<float>());
    floor = kept[how.top_k - 1];
  }
  if (how.top_p < 1) {
    kept.clear();
    for (const float value : z)
      if (value >= floor && value > kNever) kept.push_back(value);
    floor = std::max(floor, top_p_floor(kept, top, how.top_p));
  }
  double whole = 0;
  for (const float value : z)
    if (value >= floor) whole += std::exp(static_cast<double>(value) - top);
  const double point = philox_uniform(how.seed, counter) * whole;
  double reached = 0;
  std::int64_t last = 0;
  for (std::int64_t i = 0; i < vocabulary; ++i) {
    if (!(z[i] >= floor) || z[i] == kNever) continue;
    reached += std::exp(static_cast<double>(z[i]) - top);
    last = i;
    if (reached > point) return i;
  }
  return last;
}

}  // namespace latentmas
