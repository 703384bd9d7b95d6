// checksum: tells whether memory was changed. No guard against anybody who means to deceive it.
#pragma once

#include <cstdint>

namespace latentmas {

// The sum of the memory's 64-bit words, each times an odd number that is its place's own (an order that changed shows), and of
// its last bytes. Read by the whole team, at the speed of memory.
std::uint64_t checksum(const void* data, std::int64_t bytes);

}  // namespace latentmas
