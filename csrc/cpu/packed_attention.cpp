// Attention within packed documents on the CPU: from tensors to tasks, shared out among torch's
// threads. What a task computes depends on its document alone, so neither the number of threads
// nor the order of tasks changes a bit.
#include "packed_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "pages.h"
#include "tensors.h"

namespace fasttrain {
namespace {

using torch::stable::Tensor;
using Run = void (*)(const PackedAttention&, const AttentionTask&, void*);

// Below this many multiplications a second thread costs more than it saves.
constexpr double kProductsPerThread = 1 << 18;

PackedAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                         const Tensor& lse, bool causal, int64_t window, double softcap,
                         const std::optional<Tensor>& sinks, double scale) {
  PackedAttention args{};
  args.dtype = dtype_of(q);
  args.tokens = q.size(0);
  args.query_heads = q.size(1);
  args.key_heads = k.size(1);
  args.width = q.size(2);
  args.value_width = v.size(2);
  args.causal = causal;
  args.window = window == 0 ? args.tokens : std::min(window, args.tokens);
  args.softcap = softcap;
  args.scale = scale;
  args.sinks = sinks.has_value() ? sinks->const_data_ptr() : nullptr;
  args.q = heads_of(q);
  args.k = heads_of(k);
  args.v = heads_of(v);
  args.o = heads_of(o);
  args.lse = const_cast<void*>(lse.const_data_ptr());
  return args;
}

// Queries of a document, and what they cost: the keys that they see, about.
struct Span {
  AttentionTask task;  // of any head
  double cost;
};

// Every document in pieces of up to `queries`, the costliest first.
std::vector<Span> spans_of(const PackedAttention& args, const Tensor& offsets, int64_t queries) {
  const int32_t* bounds = static_cast<const int32_t*>(offsets.const_data_ptr());
  std::vector<Span> spans;
  for (int64_t document = 0; document + 1 < offsets.size(0); ++document) {
    const int64_t begin = bounds[document], length = bounds[document + 1] - begin;
    for (int64_t first = 0; first < length; first += queries) {
      const int64_t last = std::min(length, first + queries), middle = (first + last) / 2;
      const int64_t before = std::min(middle, args.window);
      const int64_t after = args.causal ? 1 : std::min(length - middle, args.window);
      const double cost = static_cast<double>(last - first) * static_cast<double>(before + after);
      spans.push_back({{begin, length, first, last, 0}, cost});
    }
  }
  std::stable_sort(spans.begin(), spans.end(),
                   [](const Span& a, const Span& b) { return a.cost > b.cost; });
  return spans;
}

using Memory = std::unique_ptr<char, decltype(&std::free)>;

Memory aligned(int64_t bytes) {
  Memory memory(static_cast<char*>(std::aligned_alloc(64, bytes)), &std::free);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// Runs every span with every key head. A thread that is done takes the next task, and the longest
// come first.
void each_task(const PackedAttention& args, const std::vector<Span>& spans, Run run,
               int64_t scratch_bytes) {
  const int64_t tasks = static_cast<int64_t>(spans.size()) * args.key_heads;
  double cost = 0;
  for (const Span& span : spans) cost += span.cost;
  cost *= static_cast<double>(args.query_heads * (args.width + args.value_width));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  const int64_t workers =
      std::clamp<int64_t>(static_cast<int64_t>(cost / kProductsPerThread), 1, threads);
  const Memory scratch = aligned(workers * scratch_bytes);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t at = next++; at < tasks; at = next++) {
      AttentionTask task = spans[at / args.key_heads].task;
      task.key_head = at % args.key_heads;
      run(args, task, scratch.get() + worker * scratch_bytes);
    }
  });
}

int64_t longest(const std::vector<Span>& spans) {
  int64_t result = 0;
  for (const Span& span : spans) result = std::max(result, span.task.length);
  return result;
}

void forward(Tensor q, Tensor k, Tensor v, Tensor offsets, bool causal, int64_t window,
             double softcap, std::optional<Tensor> sinks, double scale, Tensor o, Tensor lse) {
  const PackedAttention args =
      describe(q, k, v, o, lse, causal, window, softcap, sinks, scale);
  prefer_large_pages(o);
  const std::vector<Span> spans = spans_of(args, offsets, kQueriesPerTask);
  if (spans.empty()) return;
  each_task(args, spans, FT_BEST(packed_attention_forward),
            FT_BEST(packed_attention_forward_scratch)(args, longest(spans)));
}

void backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor offsets,
              bool causal, int64_t window, double softcap, std::optional<Tensor> sinks,
              double scale, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor dsinks) {
  PackedAttention args = describe(q, k, v, o, lse, causal, window, softcap, sinks, scale);
  for (const Tensor& gradient : {dq, dk, dv}) prefer_large_pages(gradient);
  args.dout = heads_of(dout);
  args.dq = heads_of(dq);
  args.dk = heads_of(dk);
  args.dv = heads_of(dv);
  args.delta = delta.mutable_data_ptr();
  args.dsinks = dsinks.mutable_data_ptr();
  const std::vector<Span> spans = spans_of(args, offsets, std::max<int64_t>(1, args.tokens));
  if (spans.empty()) return;
  each_task(args, spans, FT_BEST(packed_attention_backward),
            FT_BEST(packed_attention_backward_scratch)(args, longest(spans)));
  if (args.sinks == nullptr) return;
  const auto run = FT_BEST(packed_attention_sinks);
  torch::stable::parallel_for(0, args.query_heads, rows_per_thread(args.tokens),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t head = begin; head < end; ++head) run(args, head);
                              });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CPU, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&forward));
  m.impl("packed_attention_backward", TORCH_BOX(&backward));
}

}  // namespace fasttrain
