// The Python module deco_fast._C.
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "flow_matching_loss_op.h"
#include "instruction_set.h"
#include "matmul_op.h"
#include "packed_linear_op.h"
#include "pixel_decoder_op.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The C++ side of deco_fast: what this CPU can do, and the kernels for it.";
  module.attr("sources") = DECO_SOURCES;  // see kernels/sources.py
  // Torch's wrappers, and not pybind11's guard alone: they hand on the types of errors, and what
  // Python code raises that is called on the way, such as the hooks of saved tensors.
  module.def(
      "instruction_set",
      torch::wrap_pybind_function([] { return deco::name(deco::selected_instruction_set()); }),
      "The instruction set that the CPU kernels use: 'baseline', 'avx2', 'avx512', 'avx512_bf16' "
      "or 'amx'. Raises ValueError if the environment variable DECO_ISA names an unknown "
      "one or one that this CPU lacks.");
  module.def("has_fast_bfloat16", torch::wrap_pybind_function(&deco::has_fast_bfloat16),
             "See instruction_set.h.");
  module.def("has_matrix_unit", torch::wrap_pybind_function(&deco::has_matrix_unit),
             "See instruction_set.h.");
  const auto define = [&module](const char* name, auto function, const char* doc) {
    module.def(name, torch::wrap_pybind_function_no_gil(function), doc);
  };
  define("flow_matching_loss", &deco::flow_matching_loss, "See flow_matching_loss_op.h.");
  define("flow_matching_loss_forward", &deco::flow_matching_loss_forward,
         "See flow_matching_loss_op.h.");
  define("matmul", &deco::matmul, "See matmul_op.h.");
  define("prefers_matmul", &deco::prefers_matmul, "See matmul_op.h.");
  define("has_block_products", &deco::has_block_products, "See packed_linear_op.h.");
  define("pack_weight", &deco::pack_weight, "See packed_linear_op.h.");
  define("packed_linear", &deco::packed_linear, "See packed_linear_op.h.");
  define("pixel_decoder_forward", &deco::pixel_decoder_forward, "See pixel_decoder_op.h.");
  define("pixel_decoder_backward", &deco::pixel_decoder_backward, "See pixel_decoder_op.h.");
}
