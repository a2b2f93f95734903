// The threads of one call: who does which share, and where they wait for each other.
//
// A small step has hundreds of parts of some microseconds each. So a barrier is one line of cache that changes hands,
// and a thread that waits there fetches the beginning of what it reads next: that hides that threads do not arrive
// together, and that memory takes a moment to come up to speed.
#pragma once

#include <omp.h>
#include <strings.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace celeriac {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kFetchBytes = 128 * 1024;  // of the second-level cache, for what is read after a barrier

struct Share {
  int64_t begin, end;
};

// What all threads of a call have in common. Made before they start.
struct Crew {
  alignas(kLineBytes) std::atomic<int32_t> phase{0};
  alignas(kLineBytes) std::atomic<int32_t> arrived{0};
  alignas(kLineBytes) std::atomic<int64_t> taken{0};
};

// Looks at a barrier before a thread sleeps. It is told by what the OpenMP runtime is told it by, since a thread may spin
// only on a core of its own.
inline int64_t spin_limit() {
  static const int64_t limit = [] {
    if (const char* count = std::getenv("GOMP_SPINCOUNT")) return static_cast<int64_t>(std::atoll(count));
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return static_cast<int64_t>(policy && strcasecmp(policy, "passive") == 0 ? 0 : 30000);
  }();
  return limit;
}

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// One thread among those of the parallel region that it is made in.
class Team {
 public:
  const int64_t index = omp_get_thread_num(), size = omp_get_num_threads();

  explicit Team(Crew& crew) : crew_(crew) {}

  // This thread's part of `count` things: neighbours, as many for each thread as can be.
  Share share(int64_t count) const { return {count * index / size, count * (index + 1) / size}; }

  // The next of a count that all threads draw from; it begins at 0 after each barrier.
  int64_t take() { return crew_.taken.fetch_add(1, std::memory_order_relaxed); }

  // What this thread reads after the next barriers, or the beginning of it.
  void will_read(const void* at, int64_t num_bytes) {
    next_ = static_cast<const char*>(at);
    end_ = next_ + (num_bytes < kFetchBytes ? num_bytes : kFetchBytes);
  }

  // What any thread wrote before, all threads may read afterwards.
  void barrier() {
    if (size == 1) {
      crew_.taken.store(0, std::memory_order_relaxed);
      return;
    }
    const int32_t left = phase_++;
    if (crew_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < size) return wait_to_leave(left);
    crew_.arrived.store(0, std::memory_order_relaxed);
    crew_.taken.store(0, std::memory_order_relaxed);
    crew_.phase.store(phase_, std::memory_order_release);
    crew_.phase.notify_all();
  }

 private:
  void wait_to_leave(int32_t left) {
    for (int64_t looks = spin_limit(); looks > 0; looks--) {
      if (crew_.phase.load(std::memory_order_acquire) != left) return;
      if (next_ < end_)
        __builtin_prefetch(next_, 0, 2), next_ += kLineBytes;
      else
        pause();
    }
    crew_.phase.wait(left, std::memory_order_acquire);
  }

  Crew& crew_;
  int32_t phase_ = 0;
  const char *next_ = nullptr, *end_ = nullptr;
};

}  // namespace celeriac
