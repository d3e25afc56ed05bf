// The instruction sets that the CPU kernels are compiled for, and the one that runs here.
#pragma once

#include <string>

namespace deco {

// Each one includes those before it.
enum class InstructionSet { baseline, avx2, avx512, avx512_bf16, amx };

// The name that the environment variable DECO_ISA and Python use.
std::string name(InstructionSet instruction_set);

// The best one that this CPU and its operating system support. Asks the system for the matrix
// unit (AMX) of the whole process, which it gives out only on demand.
InstructionSet detect_instruction_set();

// Whether products of bfloat16 are faster here than those of float32. Without a matrix unit Intel's
// processors have bfloat16 dot products at half of float32's rate (measured on model 207); AMD's
// have them at twice that. Of other makes it is believed.
bool has_fast_bfloat16();

// Whether three products of bfloat16 are faster here than one of float32.
bool has_matrix_unit();

bool is_made_by_intel();

// The one that the kernels use: the fastest here, or the one that DECO_ISA names.
// Throws std::invalid_argument if DECO_ISA names none or one that this CPU lacks.
InstructionSet selected_instruction_set();

// The tables of kernels called `name`, one for each instruction set, in the order of the enum.
#if defined(__x86_64__)
#define DECO_KERNELS(name) \
  {&baseline::name, &avx2::name, &avx512::name, &avx512_bf16::name, &amx::name}
#else
#define DECO_KERNELS(name) {&baseline::name}
#endif

}  // namespace deco
