// Attention of one document and one key head: backward.
// Compiled once per instruction set: see vec.h for what that forbids.
//
// A block of queries meets every block of keys that it sees: five products for each pair. dq is
// gathered in the cache, dk and dv of the whole document in scratch memory, from all query heads in
// a fixed order.
#include "attention_rows.h"
#include "packed_attention.h"
#include "small_gemm.h"
#include "transpose.h"
#include "vec.h"

namespace fasttrain {
namespace FT_ISA {
namespace {

// A pair of blocks touches 320 KB with heads of width 64 in float, and 510 KB with 128: an L2 cache.
constexpr int64_t kQueries = 96;
constexpr int64_t kKeys = 96;

template <class T>
struct Work {
  Matrix<T> q, dout, dq, weights, dscores, slopes, keys, dk, dv;
  T *keys_transposed, *values_transposed, *delta;

  Work(const PackedAttention& args, int64_t length, Scratch& scratch)
      : q(scratch.matrix<T>(kQueries, args.width)),
        dout(scratch.matrix<T>(kQueries, args.value_width)),
        dq(scratch.matrix<T>(kQueries, args.width)),
        weights(scratch.matrix<T>(kQueries, kKeys)),
        dscores(scratch.matrix<T>(kQueries, kKeys)),
        slopes(scratch.matrix<T>(args.softcap != 0 ? kQueries : 0, kKeys)),
        keys(scratch.matrix<T>(length, args.width)),
        dk(scratch.matrix<T>(length, args.width)),
        dv(scratch.matrix<T>(length, args.value_width)),
        keys_transposed(scratch.panels<T>(length, args.width)),
        values_transposed(scratch.panels<T>(length, args.value_width)),
        delta(scratch.values<T>(kQueries)) {}
};

// Queries of one head from `begin` on; positions count from the document's begin.
template <class T>
struct Queries {
  int64_t begin, count;
  const T* lse;  // of these
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

// The gradients that a block of queries, whose rows are in work.q and work.dout, and the keys from
// `key` on give each other.
template <class T, bool softcap>
void add_gradients(const PackedAttention& args, const Seen& seen, const Work<T>& work,
                   const Queries<T>& queries, int64_t key) {
  const Score<T, softcap> score(args);
  const int64_t rows = queries.count, keys = smaller(kKeys, seen.length - key);
  const auto seen_by = [&](int64_t first, int64_t last) {
    return seen.keys(queries.begin + first, queries.begin + last).within(key, keys);
  };
  const auto seeing = [&](int64_t first, int64_t last) {
    return seen.queries(key + first, key + last).within(queries.begin, rows);
  };
  const auto slopes = [&](int64_t i) { return softcap ? work.slopes.row(i) : nullptr; };
  const Matrix<T> weights = work.weights, dscores = work.dscores;
  multiply_columns(work.q, work.keys_transposed + key * args.width, rows, keys, args.width,
                   weights, seen_by);
  for (int64_t i = 0; i < rows; ++i)
    weigh_row<T, softcap>(weights.row(i), slopes(i), seen_by(i, i + 1), keys, score,
                          queries.lse[i]);
  add_terms<Along::columns>(weights, work.dout, keys, args.value_width, work.dv.from(key), seeing);

  multiply_columns(work.dout, work.values_transposed + key * args.value_width, rows, keys,
                   args.value_width, dscores, seen_by);
  for (int64_t i = 0; i < rows; ++i)
    dscore_row<T, softcap>(dscores.row(i), weights.row(i), slopes(i), seen_by(i, i + 1), keys,
                           work.delta[i], static_cast<T>(args.scale));
  add_terms<Along::columns>(dscores, work.q, keys, args.width, work.dk.from(key), seeing);
  add_terms<Along::rows>(dscores, work.keys.from(key), rows, args.width, work.dq, seen_by);
}

// delta = dout . o of each row.
template <class Stored>
void write_delta(const Stored* o, int64_t stride, int64_t rows, int64_t width,
                 Matrix<Acc<Stored>> dout, Acc<Stored>* delta) {
  using T = Acc<Stored>;
  for (int64_t i = 0; i < rows; ++i)
    delta[i] = sum_over<T>(width, [&](int64_t j, auto lanes) {
      return load(dout.row(i) + j, lanes) * load(o + i * stride + j, lanes);
    });
}

// The keys and values of a document, a block at a time while it is in the cache.
template <class Stored>
void pack_keys(const PackedAttention& args, const AttentionTask& task,
               const Work<Acc<Stored>>& work) {
  for (int64_t key = 0; key < task.length; key += kKeys) {
    const int64_t keys = smaller(kKeys, task.length - key), token = task.begin + key;
    const Stored* k = row_of<const Stored>(args.k, token, task.key_head);
    const Stored* v = row_of<const Stored>(args.v, token, task.key_head);
    prefetch_rows(v, args.v.token_stride, keys, args.value_width);
    copy_rows(k, args.k.token_stride, keys, args.width, work.keys.from(key));
    transpose_rows(k, args.k.token_stride, keys, args.width, work.keys_transposed + key * args.width);
    transpose_rows(v, args.v.token_stride, keys, args.value_width,
                   work.values_transposed + key * args.value_width);
  }
}

// Rows of a gradient, from `token` on.
template <class Stored>
void store_rows(Matrix<Acc<Stored>> from, int64_t rows, int64_t width, const Heads& to,
                int64_t token, int64_t head) {
  for (int64_t i = 0; i < rows; ++i)
    store_row(from.row(i), Acc<Stored>(1), width, row_of<Stored>(to, token + i, head));
}

// dq of the queries [begin, begin + rows) of one head, and what they add to dk and dv.
template <class Stored, bool softcap>
void backward_block(const PackedAttention& args, const AttentionTask& task, const Seen& seen,
                    const Work<Acc<Stored>>& work, int64_t begin, int64_t rows, int64_t head) {
  using T = Acc<Stored>;
  const int64_t token = task.begin + begin, at = head * args.tokens + token;
  const Stored* o = row_of<const Stored>(args.o, token, head);
  prefetch_rows(o, args.o.token_stride, rows, args.value_width);
  copy_rows(row_of<const Stored>(args.q, token, head), args.q.token_stride, rows, args.width, work.q);
  copy_rows(row_of<const Stored>(args.dout, token, head), args.dout.token_stride, rows, args.value_width,
            work.dout);
  write_delta(o, args.o.token_stride, rows, args.value_width, work.dout, work.delta);
  __builtin_memcpy(static_cast<T*>(args.delta) + at, work.delta, rows * sizeof(T));
  clear(work.dq, rows);
  const Range keys = seen.keys(begin, begin + rows);
  for (int64_t key = keys.begin / kKeys * kKeys; key < keys.end; key += kKeys)
    add_gradients<T, softcap>(args, seen, work,
                              Queries<T>{begin, rows, static_cast<const T*>(args.lse) + at}, key);
  store_rows<Stored>(work.dq, rows, args.width, args.dq, token, head);
}

template <class Stored, bool softcap>
void backward(const PackedAttention& args, const AttentionTask& task, void* memory) {
  const Seen seen{args.causal, args.window, task.length};
  const int64_t groups = args.query_heads / args.key_heads, shared = task.key_head;
  Scratch scratch{reinterpret_cast<uintptr_t>(memory)};
  const Work<Acc<Stored>> work(args, task.length, scratch);
  pack_keys<Stored>(args, task, work);
  clear(work.dk, task.length);
  clear(work.dv, task.length);
  for (int64_t head = shared * groups; head < (shared + 1) * groups; ++head)
    for (int64_t begin = 0; begin < task.length; begin += kQueries)
      backward_block<Stored, softcap>(args, task, seen, work, begin,
                                      smaller(kQueries, task.length - begin), head);
  store_rows<Stored>(work.dk, task.length, args.width, args.dk, task.begin, shared);
  store_rows<Stored>(work.dv, task.length, args.value_width, args.dv, task.begin, shared);
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
