#include "pool.hpp"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace acttail {

namespace {
int64_t process() {
#if defined(_WIN32)
  return 0;  // no fork
#else
  return static_cast<int64_t>(getpid());
#endif
}

// About 0.1 ms: longer than sampling a token takes, shorter than anyone notices.
constexpr int kSpins = 3000;
}  // namespace

Pool::Pool(int threads) : process_(process()), barrier_(threads) {
  workers_.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
  } catch (...) {
    stop();  // those that did start; a joinable thread's destructor would end the process
    throw;
  }
}

Pool::~Pool() { stop(); }

bool Pool::here() const { return workers_.empty() || process_ == process(); }

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true, std::memory_order_release);
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::start(Call call, void* context) {
  call_ = call;
  context_ = context;
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  {
    // Under the lock, so that a worker about to sleep cannot miss it.
    std::lock_guard<std::mutex> lock(mutex_);
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
}

void Pool::finish() {
  for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < 4000) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < kSpins;
         ++spins) {
      pause_cpu();
    }
    if (generation_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_acquire)) return;
    call_(context_, thread);
    running_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace acttail
