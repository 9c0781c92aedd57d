// Attention of one document and one key head: backward.
// Compiled once per instruction set: see vec.h for what that forbids.
//
// A block of keys gathers its gradients from every block of queries that sees it, while dq of the
// whole document is gathered in scratch memory: five products for each pair of blocks, in a fixed
// order.
#include "attention_rows.h"
#include "packed_attention.h"
#include "small_gemm.h"
#include "transpose.h"
#include "vec.h"

namespace fasttrain {
namespace FT_ISA {
namespace {

// With heads of width 128 in float, what a pair of blocks touches is 400 KB.
constexpr int64_t kQueries = 96;
constexpr int64_t kKeys = 96;

template <class T>
struct Work {
  Matrix<T> q, dout, weights, dscores, slopes, keys, dk, dv, dq;
  T *keys_transposed, *values_transposed;

  Work(const PackedAttention& args, int64_t length, Scratch& scratch)
      : q(scratch.matrix<T>(kQueries, args.width)),
        dout(scratch.matrix<T>(kQueries, args.value_width)),
        weights(scratch.matrix<T>(kQueries, kKeys)),
        dscores(scratch.matrix<T>(kQueries, kKeys)),
        slopes(scratch.matrix<T>(args.softcap != 0 ? kQueries : 0, kKeys)),
        keys(scratch.matrix<T>(kKeys, args.width)),
        dk(scratch.matrix<T>(kKeys, args.width)),
        dv(scratch.matrix<T>(kKeys, args.value_width)),
        dq(scratch.matrix<T>(args.query_heads / args.key_heads * dq_rows(length), args.width)),
        keys_transposed(scratch.panels<T>(kKeys, args.width)),
        values_transposed(scratch.panels<T>(kKeys, args.value_width)) {}

  static int64_t dq_rows(int64_t length) { return round_up(length, kTileRows); }
};

// A block of queries of one head, and a block of keys; positions count from the document's begin.
struct Pair {
  int64_t query, queries;
  int64_t key, keys;
};

// Products become p = exp(s - lse).
template <class T, bool softcap>
FT_INLINE void weigh_row(T* row, T* slopes, Range seen, int64_t columns, Score<T, softcap> score,
                         T lse) {
  clear_unseen(row, seen, columns);
  each_seen<T>(seen, [&](int64_t i, auto lanes) {
    const Vec<T> value = score(load(row + i, Whole{}));
    if (softcap) store(slopes + i, score.slope(value), Whole{});
    store(row + i, unseen_as(T(0), exp(value - lse), lanes), Whole{});
  });
}

// dp becomes p * (dp - delta) * scale, times the slope.
template <class T, bool softcap>
FT_INLINE void dscore_row(T* row, const T* weights, const T* slopes, Range seen, int64_t columns,
                          T delta, T scale) {
  clear_unseen(row, seen, columns);
  each_seen<T>(seen, [&](int64_t i, auto lanes) {
    Vec<T> value = load(weights + i, Whole{}) * (load(row + i, Whole{}) - delta) * scale;
    if (softcap) value *= load(slopes + i, Whole{});
    store(row + i, unseen_as(T(0), value, lanes), Whole{});
  });
}

// The gradients that a pair of blocks adds. work.q and work.dout hold the queries' rows; lse and
// delta begin with them.
template <class T, bool softcap>
void add_gradients(const PackedAttention& args, const Seen& seen, const Work<T>& work,
                   const Pair& pair, const T* lse, const T* delta, Matrix<T> dq) {
  const Score<T, softcap> score(args);
  const int64_t queries = pair.queries, keys = pair.keys;
  const auto seen_by = [&](int64_t first, int64_t last) {
    return seen.keys(pair.query + first, pair.query + last).within(pair.key, keys);
  };
  const auto seeing = [&](int64_t first, int64_t last) {
    return seen.queries(pair.key + first, pair.key + last).within(pair.query, queries);
  };
  const auto slopes = [&](int64_t i) { return softcap ? work.slopes.row(i) : nullptr; };
  multiply_columns(work.q, work.keys_transposed, queries, keys, args.width, work.weights, seen_by);
  for (int64_t i = 0; i < queries; ++i)
    weigh_row<T, softcap>(work.weights.row(i), slopes(i), seen_by(i, i + 1), keys, score, lse[i]);
  add_terms<Along::columns>(work.weights, work.dout, keys, args.value_width, work.dv, seeing);

  multiply_columns(work.dout, work.values_transposed, queries, keys, args.value_width,
                   work.dscores, seen_by);
  for (int64_t i = 0; i < queries; ++i)
    dscore_row<T, softcap>(work.dscores.row(i), work.weights.row(i), slopes(i), seen_by(i, i + 1),
                           keys, delta[i], static_cast<T>(args.scale));
  add_terms<Along::columns>(work.dscores, work.q, keys, args.width, work.dk, seeing);
  add_terms<Along::rows>(work.dscores, work.keys, queries, args.width, dq, seen_by);
}

// delta = dout . o, of the rows of one document and head.
template <class Stored>
void write_delta(const PackedAttention& args, const AttentionTask& task, int64_t head) {
  using T = Acc<Stored>;
  T* delta = static_cast<T*>(args.delta) + head * args.tokens;
  for (int64_t token = task.begin; token < task.begin + task.length; ++token) {
    const Stored* dout = row_of<const Stored>(args.dout, token, head);
    const Stored* o = row_of<const Stored>(args.o, token, head);
    delta[token] = sum_over<T>(args.value_width, [&](int64_t i, auto lanes) {
      return load(dout + i, lanes) * load(o + i, lanes);
    });
  }
}

// The gradients of a block of keys from all queries of one head.
template <class Stored, bool softcap>
void from_queries(const PackedAttention& args, const AttentionTask& task, const Seen& seen,
                  const Work<Acc<Stored>>& work, Pair pair, int64_t head, Matrix<Acc<Stored>> dq) {
  using T = Acc<Stored>;
  const Range queries = seen.queries(pair.key, pair.key + pair.keys);
  for (pair.query = queries.begin / kQueries * kQueries; pair.query < queries.end;
       pair.query += kQueries) {
    pair.queries = smaller(kQueries, task.length - pair.query);
    const int64_t token = task.begin + pair.query, at = head * args.tokens + token;
    copy_rows(row_of<const Stored>(args.q, token, head), args.q.token, pair.queries, args.width,
              work.q);
    copy_rows(row_of<const Stored>(args.dout, token, head), args.dout.token, pair.queries,
              args.value_width, work.dout);
    add_gradients<T, softcap>(args, seen, work, pair, static_cast<const T*>(args.lse) + at,
                              static_cast<const T*>(args.delta) + at,
                              Matrix<T>{dq.row(pair.query), dq.stride});
  }
}

// Rows of a gradient, from the document's token `first` on.
template <class Stored>
void store_rows(Matrix<Acc<Stored>> from, int64_t rows, int64_t width, const Heads& to,
                int64_t first, int64_t head) {
  for (int64_t i = 0; i < rows; ++i)
    store_row(from.row(i), Acc<Stored>(1), width, row_of<Stored>(to, first + i, head));
}

template <class Stored, bool softcap>
void backward(const PackedAttention& args, const AttentionTask& task, void* memory) {
  using T = Acc<Stored>;
  const Seen seen{args.causal, args.window, task.length};
  const int64_t groups = args.query_heads / args.key_heads, shared = task.key_head;
  Scratch scratch{reinterpret_cast<uintptr_t>(memory)};
  const Work<T> work(args, task.length, scratch);
  const int64_t dq_rows = Work<T>::dq_rows(task.length);
  clear(work.dq, groups * dq_rows);
  for (int64_t group = 0; group < groups; ++group)
    write_delta<Stored>(args, task, shared * groups + group);
  for (int64_t key = 0; key < task.length; key += kKeys) {
    const int64_t keys = smaller(kKeys, task.length - key), token = task.begin + key;
    const Stored* k = row_of<const Stored>(args.k, token, shared);
    const Stored* v = row_of<const Stored>(args.v, token, shared);
    copy_rows(k, args.k.token, keys, args.width, work.keys);
    transpose_rows(k, args.k.token, keys, args.width, work.keys_transposed);
    transpose_rows(v, args.v.token, keys, args.value_width, work.values_transposed);
    clear(work.dk, keys);
    clear(work.dv, keys);
    for (int64_t group = 0; group < groups; ++group)
      from_queries<Stored, softcap>(args, task, seen, work, Pair{0, 0, key, keys},
                                    shared * groups + group,
                                    Matrix<T>{work.dq.row(group * dq_rows), work.dq.stride});
    store_rows<Stored>(work.dk, keys, args.width, args.dk, token, shared);
    store_rows<Stored>(work.dv, keys, args.value_width, args.dv, token, shared);
  }
  for (int64_t group = 0; group < groups; ++group)
    store_rows<Stored>(Matrix<T>{work.dq.row(group * dq_rows), work.dq.stride}, task.length,
                       args.width, args.dq, task.begin, shared * groups + group);
}

// dsink = -sum over all tokens of exp(sink - lse) delta. (lse is at least the sink, but reads as 0
// past the last token.)
template <class T>
void write_dsink(const PackedAttention& args, int64_t head) {
  const T* lse = static_cast<const T*>(args.lse) + head * args.tokens;
  const T* delta = static_cast<const T*>(args.delta) + head * args.tokens;
  const T sink = static_cast<const T*>(args.sinks)[head];
  static_cast<T*>(args.dsinks)[head] = -sum_over<T>(args.tokens, [&](int64_t i, auto lanes) {
    const Vec<T> x = sink - load(lse + i, lanes);
    return exp(x > T(0) ? Vec<T>{} : x) * load(delta + i, lanes);
  });
}

}  // namespace

void packed_attention_backward(const PackedAttention& args, const AttentionTask& task,
                               void* scratch) {
  const bool softcap = args.softcap != 0;
  if (args.dtype == DType::f64)
    return (softcap ? backward<double, true> : backward<double, false>)(args, task, scratch);
  if (args.dtype == DType::f32)
    return (softcap ? backward<float, true> : backward<float, false>)(args, task, scratch);
  return (softcap ? backward<BFloat16, true> : backward<BFloat16, false>)(args, task, scratch);
}

void packed_attention_sinks(const PackedAttention& args, int64_t head) {
  (args.dtype == DType::f64 ? write_dsink<double> : write_dsink<float>)(args, head);
}

int64_t packed_attention_backward_scratch(const PackedAttention& args, int64_t longest) {
  Scratch scratch{0};
  if (args.dtype == DType::f64)
    Work<double>(args, longest, scratch);
  else
    Work<float>(args, longest, scratch);
  return static_cast<int64_t>(scratch.next);
}

}  // namespace FT_ISA
}  // namespace fasttrain
