#include "instruction_set.h"

#include <c10/util/Exception.h>

#include <array>
#include <cstddef>
#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace deco {
namespace {

constexpr std::array<const char*, 5> kNames = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

std::string names_up_to(InstructionSet last) {
  std::string list;
  for (std::size_t i = 0; i <= static_cast<std::size_t>(last); ++i) {
    list += (i == 0 ? "" : ", ") + std::string(kNames[i]);
  }
  return list;
}

// Whether this CPU multiplies bfloat16 matrices and the system lets this process use it.
bool grants_matrix_unit() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kBFloat16) == 0 ||
      (edx & kTiles) == 0) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

std::string name(InstructionSet instruction_set) {
  return kNames[static_cast<std::size_t>(instruction_set)];
}

InstructionSet detect_instruction_set() {
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
  __builtin_cpu_init();
  // The flags of GCC and Clang that the kernels are compiled with name all of these.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return InstructionSet::baseline;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return InstructionSet::avx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) {
    return InstructionSet::avx512;
  }
  return grants_matrix_unit() ? InstructionSet::amx : InstructionSet::avx512_bf16;
#else
  return InstructionSet::baseline;
#endif
}

bool is_made_by_intel() {
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool has_fast_bfloat16() {
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
  return has_matrix_unit() || (detect_instruction_set() == InstructionSet::avx512_bf16 &&
                               !is_made_by_intel());
#else
  return true;
#endif
}

bool has_matrix_unit() { return detect_instruction_set() == InstructionSet::amx; }

InstructionSet selected_instruction_set() {
  static const InstructionSet detected = detect_instruction_set();
  static const InstructionSet fastest =
      detected == InstructionSet::avx512_bf16 && !has_fast_bfloat16() ? InstructionSet::avx512
                                                                      : detected;
  // Read at each call, so that one process can test every instruction set that it has.
  const char* variable = std::getenv("DECO_ISA");
  if (variable == nullptr || *variable == '\0') {
    return fastest;
  }
  const std::string wanted = variable;
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (wanted != kNames[i]) {
      continue;
    }
    const auto instruction_set = static_cast<InstructionSet>(i);
    TORCH_CHECK_VALUE(instruction_set <= detected, "DECO_ISA: this CPU has no ", wanted,
                      "; choose ", names_up_to(detected));
    return instruction_set;
  }
  TORCH_CHECK_VALUE(false, "DECO_ISA: unknown instruction set '", wanted, "'; choose ",
                    names_up_to(detected));
}

}  // namespace deco
