// The Python module deco_fast._C.
#include <pybind11/pybind11.h>

#include "instruction_set.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The C++ side of deco_fast: what this CPU can do.";
  module.def(
      "instruction_set", [] { return deco::name(deco::selected_instruction_set()); },
      "The instruction set that the CPU kernels use: 'baseline', 'avx2', 'avx512' or "
      "'avx512_bf16'. Raises ValueError if the environment variable DECO_ISA names an unknown "
      "one or one that this CPU lacks.");
}
