// How the values of a tensor lie in memory, as kernels are told it.
#pragma once

namespace fasttrain {

enum class DType { f32, f64, bf16 };

}  // namespace fasttrain
