// checksum: tells whether memory was changed. No guard against anybody who means to deceive it.
#pragma once

#include <cstdint>

namespace latentmas {

// A number for the memory, its order included, that is the same as long as neither it nor the number of threads changes. Read
// by the whole team, at the speed of memory.
std::uint64_t checksum(const void* data, std::int64_t bytes);

}  // namespace latentmas
