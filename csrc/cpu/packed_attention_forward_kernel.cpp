// Attention of some queries of one document: forward.
// Compiled once per instruction set: see vec.h for what that forbids.
//
// Blocks of queries meet blocks of keys; a row's maximum and sum are carried from one to the next
// (online softmax: Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691). Blocks lie on a
// grid that begins with the document, so that its neighbours change no bit.
#include "attention_rows.h"
#include "packed_attention.h"
#include "small_gemm.h"
#include "transpose.h"
#include "vec.h"

namespace fasttrain {
namespace FT_ISA {
namespace {

// A pair of blocks touches 400 KB with heads of width 128 in float: less than an L2 cache.
constexpr int64_t kQueries = 96;
constexpr int64_t kKeys = 192;
static_assert(kQueriesPerTask % kQueries == 0, "tasks begin with a block");

// The keys that a task sees, up to the beginning of a block.
FT_INLINE Range keys_of(const Seen& seen, const AttentionTask& task) {
  const Range range = seen.keys(task.first, task.last);
  return {range.begin / kKeys * kKeys, range.end};
}

template <class T>
struct Work {
  Matrix<T> q, scores, o, values;
  T *keys, *maxima, *sums;

  Work(const PackedAttention& args, int64_t all_keys, Scratch& scratch)
      : q(scratch.matrix<T>(kQueries, args.width)),
        scores(scratch.matrix<T>(kQueries, kKeys)),
        o(scratch.matrix<T>(kQueries, args.value_width)),
        values(scratch.matrix<T>(all_keys, args.value_width)),
        keys(scratch.panels<T>(all_keys, args.width)),
        maxima(scratch.values<T>(kQueries)),
        sums(scratch.values<T>(kQueries)) {}
};

template <class T>
FT_INLINE Vec<T> larger(Vec<T> one, Vec<T> other) {
  return other > one ? other : one;  // NaN is passed over: it shows in the sum
}

template <class T>
FT_INLINE T largest_lane(Vec<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value, Whole{});
#pragma GCC unroll 4
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i)
      lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  return lanes[0];
}

// Products become scores; returns the largest of those that are seen.
template <class T, bool softcap>
FT_INLINE T score_row(T* row, Range seen, Score<T, softcap> score) {
  Vec<T> largest = Vec<T>{} + lowest<T>();
  each_seen<T>(seen, [&](int64_t i, auto lanes) {
    const Vec<T> value = unseen_as(lowest<T>(), score(load(row + i, Whole{})), lanes);
    store(row + i, value, Whole{});
    largest = larger<T>(largest, value);
  });
  return largest_lane<T>(largest);
}

// Products become exp(s - maximum), and what was summed before is brought to the new maximum.
template <class T, bool softcap>
void softmax_row(T* row, Range seen, int64_t columns, Score<T, softcap> score, T& maximum, T& sum,
                 T* o, int64_t value_width) {
  clear_unseen(row, seen, columns);
  if (seen.empty()) return;
  const T highest = score_row(row, seen, score);
  const T before = maximum;
  maximum = highest > before ? highest : before;
  const T offset = maximum == lowest<T>() ? T(0) : maximum;
  Vec<T> added{};
  each_seen<T>(seen, [&](int64_t i, auto) {
    const Vec<T> value = exp(load(row + i, Whole{}) - offset);
    store(row + i, value, Whole{});
    added += value;
  });
  if (maximum != before && before != lowest<T>()) {
    const T factor = exp_of(before - offset);
    sum *= factor;
    for (int64_t i = 0; i < value_width; i += kLanes<T>)
      store(o + i, load(o + i, Whole{}) * factor, Whole{});
  }
  sum += sum_lanes<T>(added);
}

// o and the softmax's statistics of a block of queries, whose rows are in work.q.
template <class T, bool softcap>
void attend(const PackedAttention& args, const Seen& seen, const Work<T>& work, int64_t first_key,
            int64_t begin, int64_t queries) {
  const Score<T, softcap> score(args);
  const Range keys = seen.keys(begin, begin + queries);
  for (int64_t key = keys.begin / kKeys * kKeys; key < keys.end; key += kKeys) {
    const int64_t columns = smaller(kKeys, seen.length - key), packed = key - first_key;
    const auto seen_by = [&](int64_t first, int64_t last) {
      return seen.keys(begin + first, begin + last).within(key, columns);
    };
    multiply_columns(work.q, work.keys + packed * args.width, queries, columns, args.width,
                     work.scores, seen_by);
    for (int64_t i = 0; i < queries; ++i)
      softmax_row<T, softcap>(work.scores.row(i), seen_by(i, i + 1), columns, score,
                              work.maxima[i], work.sums[i], work.o.row(i), args.value_width);
    add_terms<Along::rows>(work.scores, work.values.from(packed), queries, args.value_width,
                           work.o, seen_by);
  }
}

// Keys and values of the tokens from `token` on, a block at a time.
template <class Stored>
void pack_keys(const PackedAttention& args, int64_t token, int64_t keys, int64_t head,
               const Work<Acc<Stored>>& work) {
  for (int64_t key = 0; key < keys; key += kKeys) {
    const int64_t rows = smaller(kKeys, keys - key);
    const Stored* v = row_of<const Stored>(args.v, token + key, head);
    prefetch_rows(v, args.v.token_stride, rows, args.value_width);
    transpose_rows(row_of<const Stored>(args.k, token + key, head), args.k.token_stride, rows, args.width,
                   work.keys + key * args.width);
    copy_rows(v, args.v.token_stride, rows, args.value_width, work.values.from(key));
  }
}

// o and lse of the queries [begin, begin + queries) of one head.
template <class Stored, bool softcap>
void forward_block(const PackedAttention& args, const AttentionTask& task, const Seen& seen,
                   const Work<Acc<Stored>>& work, int64_t first_key, int64_t begin,
                   int64_t queries, int64_t head) {
  using T = Acc<Stored>;
  const int64_t token = task.begin + begin;
  const T* sink = args.sinks == nullptr ? nullptr : static_cast<const T*>(args.sinks) + head;
  copy_rows(row_of<const Stored>(args.q, token, head), args.q.token_stride, queries, args.width, work.q);
  clear(work.o, queries);
  for (int64_t i = 0; i < queries; ++i) {
    work.maxima[i] = sink == nullptr ? lowest<T>() : *sink;
    work.sums[i] = work.maxima[i] == lowest<T>() ? T(0) : T(1);  // a sink of -inf is none
  }
  attend<T, softcap>(args, seen, work, first_key, begin, queries);
  T* lse = static_cast<T*>(args.lse) + head * args.tokens + token;
  for (int64_t i = 0; i < queries; ++i) {
    store_row(work.o.row(i), T(1) / work.sums[i], args.value_width,
              row_of<Stored>(args.o, token + i, head));
    lse[i] = work.maxima[i] + log(work.sums[i]);
  }
}

template <class Stored, bool softcap>
void forward(const PackedAttention& args, const AttentionTask& task, void* memory) {
  using T = Acc<Stored>;
  const Seen seen{args.causal, args.window, task.length};
  const Range keys = keys_of(seen, task);
  const int64_t all_keys = keys.end - keys.begin;
  const int64_t groups = args.query_heads / args.key_heads, shared = task.key_head;
  Scratch scratch{reinterpret_cast<uintptr_t>(memory)};
  const Work<T> work(args, all_keys, scratch);
  pack_keys<Stored>(args, task.begin + keys.begin, all_keys, shared, work);
  for (int64_t head = shared * groups; head < (shared + 1) * groups; ++head)
    for (int64_t begin = task.first; begin < task.last; begin += kQueries)
      forward_block<Stored, softcap>(args, task, seen, work, keys.begin, begin,
                                     smaller(kQueries, task.last - begin), head);
}

}  // namespace

void packed_attention_forward(const PackedAttention& args, const AttentionTask& task,
                              void* scratch) {
  const bool softcap = args.softcap != 0;
  if (args.dtype == DType::f64)
    return (softcap ? forward<double, true> : forward<double, false>)(args, task, scratch);
  if (args.dtype == DType::f32)
    return (softcap ? forward<float, true> : forward<float, false>)(args, task, scratch);
  return (softcap ? forward<BFloat16, true> : forward<BFloat16, false>)(args, task, scratch);
}

int64_t packed_attention_forward_scratch(const PackedAttention& args, int64_t longest) {
  const int64_t keys = smaller(longest, kQueriesPerTask + 2 * args.window + kKeys);
  Scratch scratch{0};
  if (args.dtype == DType::f64)
    Work<double>(args, keys, scratch);
  else
    Work<float>(args, keys, scratch);
  return static_cast<int64_t>(scratch.next);
}

}  // namespace FT_ISA
}  // namespace fasttrain
