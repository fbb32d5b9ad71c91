// The output head of several tokens, which is read once for up to kMostTogether of them.
#include <algorithm>
#include <cstring>

#include "batch.hpp"

namespace acttail {

namespace {

// Of an output-major head that are taken at a time: the next vectors find them in the third-level cache, and one vector's
// integers, made anew for each part, are a hundredth of the work.
constexpr int64_t kHeadBytes = int64_t{2} << 20;

}  // namespace

void Batch::head(const Crew& crew) {
  const acttail_model& m = engine_.model;
  const acttail_fused& f = m.head_input;
  own(crew, [&](Lane& lane, int64_t i) {
    if (row(i).logits == nullptr) return;
    if (f.matrices > 0) {
      choose(lane, f, lane.normed.data(), i);
      return;
    }
    row(i).read += static_cast<double>(m.vocabulary * m.hidden);
    if (f.segments == 0) return;
    const Parts& parts = lane.selection[0].choose(engine_.kernels, engine_.head_selection, lane.normed.data());
    std::memcpy(lane.masked.data(), parts.begin()->rows.x, sizeof(float) * static_cast<size_t>(m.hidden));
    lane.normed.swap(lane.masked);
  });
  meet(crew);
  int64_t wanted[kMostRows], count = 0;
  for (int64_t i = crew.first; i < crew.last; ++i) {
    if (row(i).logits != nullptr) wanted[count++] = i;
  }
  if (count == 0) return;
  for (int t = crew.from; t < crew.to; ++t) {
    if (f.matrices > 0) {
      listed_head(crew, t, wanted, count);
    } else {
      dense_head(crew, t, wanted, count);
    }
  }
}

// Outputs are shared out.
void Batch::dense_head(const Crew& crew, int t, const int64_t* lanes, int64_t count) {
  const acttail_model& m = engine_.model;
  const int64_t threads = engine_.pool.threads();
  const int64_t first = m.vocabulary * t / threads, last = m.vocabulary * (t + 1) / threads;
  const int64_t step = std::max<int64_t>(1, kHeadBytes / row_bytes(m.head));
  uint8_t* const scratch = dot_.data() + crew.thread * kMostTogether * dot_scratch(padded(m.hidden));
  for (int64_t at = first; at < last; at += step) {
    for (int64_t group = 0; group < count; group += kMostTogether) {
      const int64_t n = std::min(kMostTogether, count - group);
      const float* x[kMostTogether];
      float* y[kMostTogether];
      for (int64_t k = 0; k < n; ++k) {
        x[k] = lanes_[static_cast<size_t>(lanes[group + k])]->normed.data();
        y[k] = row(lanes[group + k]).logits;
      }
      engine_.kernels.dot_rows_together(m.head, x, n, at, std::min(at + step, last), y, scratch);
    }
  }
  for (int64_t k = 0; k < count; ++k) engine_.finish_logits(row(lanes[k]).logits, first, last);
}

// Of a head with rows of its own: outputs are shared out in blocks.
void Batch::listed_head(const Crew& crew, int t, const int64_t* lanes, int64_t count) {
  const int64_t threads = engine_.pool.threads(), vocabulary = engine_.model.vocabulary;
  const acttail_matrix& m = engine_.model.head_input.matrix[0];
  const int64_t block = kFormatTraits[m.format].block, blocks = m.columns / block;
  const int64_t first = blocks * t / threads * block, end = blocks * (t + 1) / threads * block;
  float* const sums = head_sums_.data() + crew.thread * kMostTogether * head_columns_;
  for (int64_t at = first; at < end; at += head_columns_) {
    const int64_t to = std::min(at + head_columns_, end), columns = to - at;
    for (int64_t group = 0; group < count; group += kMostTogether) {
      const int64_t n = std::min(kMostTogether, count - group);
      Rows rows[kMostTogether];
      // One segment: a part, or none where no row is kept.
      for (int64_t k = 0; k < n; ++k) {
        const Parts& own = *lanes_[static_cast<size_t>(lanes[group + k])]->parts[0];
        rows[k] = own.begin() == own.end() ? Rows{nullptr, nullptr, 0, 0} : own.begin()->rows;
        std::fill(sums + k * head_columns_, sums + k * head_columns_ + columns, 0.0f);
      }
      // Only columns at .. to - 1 of it are touched.
      engine_.kernels.add_rows_together(m, rows, n, at, to, sums - at, head_columns_,
                                        scratch_.data() + crew.thread * kTogetherScratch);
      const int64_t wanted = std::min(to, vocabulary) - at;  // the rest is padding
      for (int64_t k = 0; k < n && wanted > 0; ++k) {
        std::memcpy(row(lanes[group + k]).logits + at, sums + k * head_columns_, sizeof(float) * static_cast<size_t>(wanted));
      }
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    engine_.finish_logits(row(lanes[k]).logits, std::min(first, vocabulary), std::min(end, vocabulary));
  }
}

}  // namespace acttail
