// checksum: detects changes of memory; not a protection against deliberate ones.
#pragma once

#include <cstdint>

namespace latentmas {

// Returns a number for the memory, its order included, that is the same as long as neither the memory nor the number of threads
// changes. All threads of the team read, at the speed of memory.
std::uint64_t checksum(const void* data, std::int64_t bytes);

}  // namespace latentmas
