// What the library says of itself, and the threads it is given: see arsg_dist/optim/kernels/cpu_library.py.

#include "elements.h"
#include "parallel.h"

// To be raised, here and in cpu_library.py, whenever a function's arguments or a struct change: a library that was
// compiled before that is recognised and left alone.
EXPORTED int arsg_interface() {
  return 3;
}

EXPORTED void arsg_use_openmp(void* parallel, void* num_threads, void* thread_num) {
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
  openmp.num_threads = reinterpret_cast<decltype(openmp.num_threads)>(num_threads);
  openmp.thread_num = reinterpret_cast<decltype(openmp.thread_num)>(thread_num);
}
