// What the kernels ask of a tensor before they take its address. These hold for every call from
// kernels/<op>/cpu.py; they are checked because a wrong one would be memory that is not ours.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "element.h"

namespace deco {

inline void check(const at::Tensor& tensor, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU");
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " must be ", sizes, ", not ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_float(const at::Tensor& tensor, at::IntArrayRef sizes, const char* name) {
  check(tensor, sizes, name);
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, name, " must be float32");
}

inline Element element_of(const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16,
                    "the CPU kernels take float32 and bfloat16, not ", type);
  return type == at::kFloat ? Element::float32 : Element::bfloat16;
}

}  // namespace deco
