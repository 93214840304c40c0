"""Run `python -m arsg_dist.launch.watch mpirun ...` as batch scripts have it: `arsg_dist.cli.launch.supervise`."""

import sys

from arsg_dist.cli.launch.supervise import LOST_HOST, run_watched

if __name__ == "__main__":
    sys.exit(run_watched(sys.argv[1:], LOST_HOST))
