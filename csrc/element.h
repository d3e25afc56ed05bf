// How a tensor that a kernel reads or writes is stored.
#pragma once

namespace deco {

enum class Element { float32, bfloat16 };

}  // namespace deco
