#include "route.hpp"

#include <algorithm>
#include <cmath>

namespace acttail {

namespace {

using Entry = std::pair<float, int64_t>;

// Largest first, NaN before all, as torch.topk has it.
bool before(const Entry& x, const Entry& y) {
  return (std::isnan(x.first) && !std::isnan(y.first)) || x.first > y.first;
}

// The k largest of the queue to its front, by the steps of torch's own topk on a CPU, so that of equal entries the same
// ones stay.
void largest(std::vector<Entry>& queue, int64_t n, int64_t k) {
  const auto end = queue.begin() + n;
  if (k * 64 <= n) {
    std::partial_sort(queue.begin(), queue.begin() + k, end, before);
    return;
  }
  std::nth_element(queue.begin(), queue.begin() + k - 1, end, before);
  std::sort(queue.begin(), queue.begin() + k - 1, before);
}

}  // namespace

Route::Route(int64_t most_experts, int64_t most_visits)
    : queue_(static_cast<size_t>(most_experts)), visit_(static_cast<size_t>(most_visits)) {}

void Route::plain(const acttail_block& b) {
  visit_[0] = {&b.mlp, b.experts, 1.0f};
  count_ = 1;
}

void Route::choose(const acttail_block& b, const float* products) {
  const float top = *std::max_element(products, products + b.experts);
  float total = 0;
  for (int64_t e = 0; e < b.experts; ++e) {
    const float p = std::exp(products[e] - top);
    queue_[static_cast<size_t>(e)] = {p, e};
    total += p;
  }
  for (int64_t e = 0; e < b.experts; ++e) queue_[static_cast<size_t>(e)].first /= total;
  largest(queue_, b.experts, b.active);
  float chosen = 1;
  if (b.normalised) {
    chosen = 0;
    for (int64_t i = 0; i < b.active; ++i) chosen += queue_[static_cast<size_t>(i)].first;
  }
  count_ = 0;
  for (int64_t i = 0; i < b.active; ++i) {
    const Entry& entry = queue_[static_cast<size_t>(i)];
    visit_[static_cast<size_t>(count_++)] = {b.expert + entry.second, entry.second, entry.first / chosen};
  }
  if (!own_mlp(b)) return;
  const float gate = b.shared_gate ? 1.0f / (1.0f + std::exp(-products[b.experts])) : 1.0f;
  visit_[static_cast<size_t>(count_++)] = {&b.mlp, b.experts, gate};
}

}  // namespace acttail
