#include "checksum.h"

#include <atomic>
#include <cstring>

#include "threads.h"

namespace latentmas {

namespace {

std::uint64_t word(const void* data, std::int64_t index, std::size_t bytes = 8) {
  std::uint64_t value = 0;
  std::memcpy(&value, static_cast<const char*>(data) + index * 8, bytes);
  return value;
}

}  // namespace

std::uint64_t checksum(const void* data, std::int64_t bytes) {
  struct Argument {
    const void* data;
    std::int64_t words;
    mutable std::atomic<std::uint64_t> sum;
  };
  const std::int64_t words = bytes / 8;
  const Argument argument{data, words, {word(data, words, bytes % 8)}};
  run_on_team(
      [](const void* given, const Member& me) {
        const Argument& a = *static_cast<const Argument*>(given);
        const Range mine = me.share(a.words);
        std::uint64_t sum = 0;
        for (std::int64_t i = mine.begin; i < mine.end; ++i) sum += word(a.data, i) * (2 * static_cast<std::uint64_t>(i) + 1);
        a.sum += sum;
      },
      &argument, team_size());
  return argument.sum;
}

}  // namespace latentmas
