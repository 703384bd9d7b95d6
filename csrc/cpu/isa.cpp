// Choice of the instruction set among those that were compiled.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(LATENTMAS_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace latentmas {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
};

#ifdef LATENTMAS_X86
// Tiles and their bf16 products; clang 14 does not know the names for __builtin_cpu_supports.
bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTiles = 1u << 24, kProducts = 1u << 22;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kProducts);
}

// Linux grants the tile registers to a process that requests them, for all of its threads.
bool may_use_tiles() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first. __builtin_cpu_supports also asks whether the operating system saves the wide registers.
std::vector<Isa> find() {
  std::vector<Isa> found;
#ifdef LATENTMAS_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) {
      if (has_tiles() && may_use_tiles())
        found.push_back({"amx", &amx::kernels});
      found.push_back({"avx512bf16", &avx512bf16::kernels});
    }
    found.push_back({"avx512", &avx512::kernels});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", &avx2::kernels});
#endif
  found.push_back({"portable", &portable::kernels});
  return found;
}

const std::vector<Isa>& runnable() {
  static const std::vector<Isa> isas = find();
  return isas;
}

const std::string& names() {
  static const std::string all = [] {
    std::string joined;
    for (const Isa& isa : runnable()) joined += (joined.empty() ? "" : " ") + std::string(isa.name);
    return joined;
  }();
  return all;
}

const Isa& chosen() {
  const char* requested = std::getenv("LATENTMAS_ISA");
  if (!requested || !*requested) return runnable().front();
  for (const Isa& isa : runnable())
    if (isa.name == std::string(requested)) return isa;
  throw std::runtime_error("LATENTMAS_ISA=" + std::string(requested) + " cannot run on this processor; it has: " + names() +
                           ". Unset the variable or name one of these.");
}

}  // namespace

const char* available_isas() { return names().c_str(); }
const char* active_isa() { return chosen().name; }
const Kernels& active() { return *chosen().kernels; }

}  // namespace latentmas
