// Moves parameters on to the next observation point in one pass over memory: the rule of
// arsg_dist/optim/kernels/remote.py. Reads x, x₀ and d, writes x and d: 20 bytes per float32 element.

#include <type_traits>

#include "elements.h"
#include "parallel.h"

namespace {

template <typename A>
struct Move {
  A beta1, pull, reach, decay;
};

struct MoveJob {  // _MOVE_JOB in cpu_library.py
  void *param, *movement;
  const void* before;
  int64_t numel;
};

template <bool kDecays, bool kMoves, typename P, typename A>
MULTIVERSION void move_on(
    Storage<P>* __restrict param,
    const Storage<P>* __restrict before,
    A* __restrict movement,
    const int64_t numel,
    const Move<A> s) {
  for (int64_t i = 0; i < numel; ++i) {
    A x = load<P, A>(param[i]);
    const A old = load<P, A>(before[i]);
    if constexpr (kDecays) {
      const A step = x - old;
      const bool away = ((step > 0) & (old > 0)) | ((step < 0) & (old < 0));
      x = x - (away ? A{0} : s.decay) * old;
    }
    if constexpr (kMoves) {
      const A d = s.beta1 * movement[i] + s.pull * (x - old);
      movement[i] = d;
      x = x + s.reach * d;
    }
    param[i] = store<P>(x);
  }
}

template <bool kDecays, bool kMoves, typename P, typename A>
void move_all(const MoveJob* jobs, const int64_t count, const int threads, const Move<double>& s) {
  const Move<A> move{
      static_cast<A>(s.beta1), static_cast<A>(s.pull), static_cast<A>(s.reach), static_cast<A>(s.decay)};
  parallel_elements(jobs, count, threads, [&](const MoveJob& job, const int64_t from, const int64_t to) {
    move_on<kDecays, kMoves, P, A>(
        static_cast<Storage<P>*>(job.param) + from,
        static_cast<const Storage<P>*>(job.before) + from,
        job.movement == nullptr ? nullptr : static_cast<A*>(job.movement) + from,
        to - from,
        move);
  });
}

template <typename P>
bool dispatch(const MoveJob* jobs, const int64_t count, const int threads, const Move<double>& s, const bool moves) {
  using A = std::conditional_t<std::is_same_v<P, double>, double, float>;
  if (s.decay != 0.0 && moves) {
    move_all<true, true, P, A>(jobs, count, threads, s);
  } else if (s.decay != 0.0) {
    move_all<true, false, P, A>(jobs, count, threads, s);
  } else {
    move_all<false, true, P, A>(jobs, count, threads, s);
  }
  return true;
}

} // namespace

// The numbers are those of `Move` in remote.py. Returns whether the type is known; only then is anything touched.
EXPORTED bool arsg_move_on(
    const MoveJob* jobs,
    const int64_t count,
    const int threads,
    const int param_type,
    const bool moves,
    const double beta1,
    const double pull,
    const double reach,
    const double decay) {
  const Move<double> s{beta1, pull, reach, decay};
  switch (param_type) {
    case kFloat32:
      return dispatch<float>(jobs, count, threads, s, moves);
    case kFloat64:
      return dispatch<double>(jobs, count, threads, s, moves);
    case kBFloat16:
      return dispatch<BFloat16Bits>(jobs, count, threads, s, moves);
    case kFloat16:
      return dispatch<HalfBits>(jobs, count, threads, s, moves);
    default:
      return false;
  }
}
