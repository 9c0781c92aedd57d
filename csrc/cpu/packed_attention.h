// Attention within packed documents: what the op (packed_attention.cpp) asks of the kernels
// (packed_attention_forward_kernel.cpp and its twin for the backward pass). The formulas are in
// kernels/fasttrain_kernels/ops/packed_attention/reference.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "heads.h"
#include "isa.h"

namespace fasttrain {

// "Accumulated" is float, or double where q is double.
struct PackedAttention {
  DType dtype;  // of q, k, v, o, their gradients
  int64_t tokens;
  int64_t query_heads;
  int64_t key_heads;
  int64_t width;        // of queries and keys
  int64_t value_width;  // of values and of o
  bool causal;
  int64_t window;  // at most `tokens`; that much where there is none
  double softcap;  // 0: none
  double scale;
  const void* sinks;  // (Hq), accumulated; null: none
  Heads q, k, v, o;
  void* lse;  // (Hq, T), accumulated
  // Of the backward pass alone.
  Heads dout, dq, dk, dv;
  void* delta;   // (Hq, T), accumulated
  void* dsinks;  // (Hq), accumulated
};

// Queries [first, last) of the document that begins at token `begin`, of the heads that share
// `key_head`. The backward pass takes whole documents.
struct AttentionTask {
  int64_t begin;
  int64_t length;
  int64_t first;
  int64_t last;
  int64_t key_head;
};

// Documents are cut into tasks of the forward pass at multiples of this.
constexpr int64_t kQueriesPerTask = 1152;

// forward writes o and lse; backward dq, dk, dv and delta; sinks, after all of backward, dsinks of
// one head. scratch: how many bytes a task needs, aligned to 64, for documents of up to `longest`.
#define FT_DECLARE_PACKED_ATTENTION(isa)                                                        \
  namespace isa {                                                                               \
  void packed_attention_forward(const PackedAttention& args, const AttentionTask& task,         \
                                void* scratch);                                                 \
  void packed_attention_backward(const PackedAttention& args, const AttentionTask& task,        \
                                 void* scratch);                                                \
  void packed_attention_sinks(const PackedAttention& args, int64_t head);                       \
  int64_t packed_attention_forward_scratch(const PackedAttention& args, int64_t longest);       \
  int64_t packed_attention_backward_scratch(const PackedAttention& args, int64_t longest);      \
  }
FT_EACH_ISA(FT_DECLARE_PACKED_ATTENTION)
#undef FT_DECLARE_PACKED_ATTENTION

}  // namespace fasttrain
