// The threads of the kernels in this folder are those of the OpenMP runtime that torch has loaded (libgomp or another
// with its entry points): torch.set_num_threads governs them, and no second pool competes for the cores. The library
// links against no runtime; Python hands over the entry points of torch's (`arsg_use_openmp` in library.cpp).

#pragma once

#include <cstdint>

struct OpenMP {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
  int (*num_threads)();                                                                     // omp_get_num_threads
  int (*thread_num)();                                                                      // omp_get_thread_num
};

inline OpenMP openmp{};

// Calls function(begin, end) on up to `threads` threads, for equal shares of [0, count) of at least `grain`.
template <typename Function>
void parallel_for(const int64_t count, const int64_t grain, const int threads, const Function& function) {
  if (threads <= 1 || count <= grain || openmp.parallel == nullptr) {
    function(int64_t{0}, count);
    return;
  }
  struct Work {
    const Function& function;
    int64_t count, grain;
  } work{function, count, grain};
  openmp.parallel(
      [](void* data) {
        const Work& w = *static_cast<const Work*>(data);
        const auto up = [](const int64_t a, const int64_t b) { return (a + b - 1) / b; };
        const int64_t most = up(w.count, w.grain), got = openmp.num_threads();
        const int64_t share = up(w.count, got < most ? got : most);
        const int64_t begin = openmp.thread_num() * share;
        const int64_t end = begin + share < w.count ? begin + share : w.count;
        if (begin < end) {
          w.function(begin, end);
        }
      },
      &work,
      static_cast<unsigned>(threads),
      0);
}

// Cuts the elements of all tensors into shares: one fork and join per step, however many tensors there are. Shares
// begin at whole blocks so that vector loads stay aligned. `function` gets a job and the range of its elements.
constexpr int64_t kGrain = 16384;

template <int64_t kBlock = 64, typename Job, typename Function>
void parallel_elements(const Job* jobs, const int64_t count, const int threads, const Function& function) {
  const auto blocks_of = [](const Job& job) { return (job.numel + kBlock - 1) / kBlock; };
  int64_t blocks = 0;
  for (int64_t k = 0; k < count; ++k) {
    blocks += blocks_of(jobs[k]);
  }
  parallel_for(blocks, kGrain / kBlock, threads, [&](const int64_t begin, const int64_t end) {
    int64_t first = 0;  // block of this share's numbering at which job k begins
    for (int64_t k = 0; k < count && first < end; ++k) {
      const Job& job = jobs[k];
      const int64_t from = (begin > first ? begin - first : 0) * kBlock;
      const int64_t upto = (end - first) * kBlock;
      const int64_t to = upto < job.numel ? upto : job.numel;
      if (from < to) {
        function(job, from, to);
      }
      first += blocks_of(job);
    }
  });
}
