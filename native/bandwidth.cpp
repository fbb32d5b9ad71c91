// How fast this machine reads memory: the limit of batch-1 decoding.
#include <atomic>
#include <chrono>
#include <cstdint>

#include "guard.hpp"
#include "pool.hpp"

namespace {

double seconds(const uint64_t* data, int64_t words, int threads) {
  acttail::Pool pool(threads);
  std::atomic<uint64_t> sink{0};
  auto read = [&](int t) {
    const int64_t first = words * t / threads / 64 * 64, last = words * (t + 1) / threads / 64 * 64;
    uint64_t lanes[32] = {};
    for (int64_t i = first; i + 32 <= last; i += 32) {
      for (int j = 0; j < 32; ++j) lanes[j] ^= data[i + j];
    }
    uint64_t total = 0;
    for (uint64_t lane : lanes) total ^= lane;
    sink.fetch_xor(total, std::memory_order_relaxed);
  };
  pool.run(read);  // the workers are awake from here on
  const auto start = std::chrono::steady_clock::now();
  pool.run(read);
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
  // The sum is looked at, so that the reads are not removed.
  return passed.count() + (sink.load() == 0x5bd1e995u ? 1e-12 : 0.0);
}

}  // namespace

extern "C" double acttail_read_seconds(const uint64_t* data, int64_t words, int threads) {
  if (data == nullptr || words < 64 || threads < 1 || threads > 256) return -1;
  double found = -1;
  const int status = acttail::guarded([&] {
    found = seconds(data, words, threads);
    return ACTTAIL_OK;
  });
  return status == ACTTAIL_OK ? found : -1;
}
