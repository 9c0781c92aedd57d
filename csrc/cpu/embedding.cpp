// The gradient of an embedding on the CPU: from tensors to places, shared out among torch's threads.
#include "embedding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>

#include "pages.h"
#include "tensors.h"

namespace fasttrain {
namespace {

using torch::stable::Tensor;

void clear(Tensor& tensor) {
  prefer_large_pages(tensor);
  char* bytes = static_cast<char*>(tensor.mutable_data_ptr());
  torch::stable::parallel_for(
      0, tensor.numel() * tensor.element_size(), int64_t{1} << 20,
      [&](int64_t begin, int64_t end) { std::memset(bytes + begin, 0, end - begin); });
}

// A row of dweight is one thread's sum, in each block of columns: the number of threads changes no
// bit.
void backward(Tensor dy, Tensor owners, Tensor tokens, Tensor dweight) {
  clear(dweight);
  EmbeddingBackward args{};
  args.count = dy.size(0);
  args.rows = dweight.size(0);
  args.width = dy.size(1);
  args.dy = dy.const_data_ptr();
  args.dy_stride = dy.stride(0);
  args.dtype = dtype_of(dy);
  args.owners = static_cast<const int32_t*>(owners.const_data_ptr());
  args.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
  args.dweight = dweight.mutable_data_ptr();
  const int64_t blocks = (args.width + kEmbeddingColumns - 1) / kEmbeddingColumns;
  const auto run = FT_BEST(embedding_backward);
  torch::stable::parallel_for(0, blocks * args.count,
                              rows_per_thread(std::min(args.width, kEmbeddingColumns)),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CPU, m) {
  m.impl("embedding_backward", TORCH_BOX(&backward));
}

}  // namespace fasttrain
