// Chooses, once per process, which of the compiled instruction sets runs.
#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace latentmas {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
};

// Best first. __builtin_cpu_supports also asks whether the operating system saves the wide registers.
std::vector<Isa> runnable() {
  std::vector<Isa> found;
#ifdef LATENTMAS_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back({"avx512", &avx512::kernels});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", &avx2::kernels});
#endif
  found.push_back({"portable", &portable::kernels});
  return found;
}

std::string join(const std::vector<Isa>& isas) {
  std::string names;
  for (const Isa& isa : isas) names += (names.empty() ? "" : " ") + std::string(isa.name);
  return names;
}

Isa choose() {
  const std::vector<Isa> isas = runnable();
  const char* wanted = std::getenv("LATENTMAS_ISA");
  if (!wanted || !*wanted) return isas.front();
  for (const Isa& isa : isas)
    if (isa.name == std::string(wanted)) return isa;
  throw std::runtime_error("LATENTMAS_ISA=" + std::string(wanted) + " cannot run on this processor; it has: " +
                           join(isas) + ". Unset the variable or name one of these.");
}

const Isa& chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const char* available_isas() {
  static const std::string names = join(runnable());
  return names.c_str();
}
const char* active_isa() { return chosen().name; }
const Kernels& active() { return *chosen().kernels; }

}  // namespace latentmas
