// A few threads that run one function together, and the barrier they meet at inside it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace acttail {

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A sense-reversing spin barrier. A token passes 5 a block, about 0.2 µs each; a thread that waits long
// yields, so that more threads than cores still make progress.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    if (threads_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 4000) {
        pause_cpu();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> phase_{0};
};

// The caller is thread 0. Workers spin for a short while after a run, for the next token comes soon, and
// then sleep, so that an idle engine costs nothing and does not fight torch's own threads.
class Pool {
 public:
  // Throws what a thread that cannot be started throws.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Whether this is the process that the threads run in: a child of fork() has none of them.
  bool here() const;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  Barrier& barrier() { return barrier_; }

  // Runs f(thread) on every thread and returns when all are done.
  template <typename Function>
  void run(Function& f) {
    if (workers_.empty()) return f(0);
    start([](void* context, int thread) { (*static_cast<Function*>(context))(thread); }, &f);
    f(0);
    finish();
  }

 private:
  using Call = void (*)(void*, int);
  void start(Call call, void* context);
  void finish();
  void stop();
  void work(int thread);

  const int64_t process_;
  Barrier barrier_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> running_{0};
  std::atomic<bool> stop_{false};
  Call call_ = nullptr;
  void* context_ = nullptr;
};

}  // namespace acttail
