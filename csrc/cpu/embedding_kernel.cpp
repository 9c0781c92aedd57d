// The gradient of an embedding: sums over the tokens of a row, in their order.
// Compiled once per instruction set: see vec.h for what that forbids.
#include "embedding.h"
#include "vec.h"

namespace fasttrain {
namespace FT_ISA {
namespace {

// out = the sum of dy over `count` tokens, for `width` columns, at most kEmbeddingColumns.
template <class T>
void sum_tokens(const T* dy, int64_t dy_stride, const int64_t* tokens, int64_t count, T* out,
                int64_t width) {
  using A = Acc<T>;
  const T* first = dy + tokens[0] * dy_stride;
  if (count == 1) {
    each_vector<A>(width, [&](int64_t i, auto lanes) { store(out + i, load(first + i, lanes), lanes); });
    return;
  }
  A sum[kEmbeddingColumns];
  each_vector<A>(width, [&](int64_t i, auto lanes) { store(sum + i, load(first + i, lanes), lanes); });
  for (int64_t k = 1; k < count - 1; ++k) {
    const T* next = dy + tokens[k] * dy_stride;
    each_vector<A>(width, [&](int64_t i, auto lanes) {
      store(sum + i, load(sum + i, lanes) + load(next + i, lanes), lanes);
    });
  }
  const T* last = dy + tokens[count - 1] * dy_stride;
  each_vector<A>(width, [&](int64_t i, auto lanes) {
    store(out + i, load(sum + i, lanes) + load(last + i, lanes), lanes);
  });
}

template <class T>
void sum_places(const EmbeddingBackward& args, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t place = unit % args.count, column = unit / args.count * kEmbeddingColumns;
    const int32_t row = args.owners[place];
    if (row == args.rows || (place > 0 && args.owners[place - 1] == row)) continue;
    int64_t next = place + 1;
    while (next < args.count && args.owners[next] == row) ++next;
    const int64_t left = args.width - column;
    sum_tokens(static_cast<const T*>(args.dy) + column, args.dy_stride, args.tokens + place,
               next - place, static_cast<T*>(args.dweight) + row * args.width + column,
               left < kEmbeddingColumns ? left : kEmbeddingColumns);
  }
}

}  // namespace

void embedding_backward(const EmbeddingBackward& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::f64) return sum_places<double>(args, begin, end);
  if (args.dtype == DType::f32) return sum_places<float>(args, begin, end);
  sum_places<BFloat16>(args, begin, end);
}

}  // namespace FT_ISA
}  // namespace fasttrain
