#!/usr/bin/env bash
# Runs the tests: the core by default, everything that can run on this machine with --everything.
# Other arguments go to pytest. Two workers, since most tests wait half of their time: for a start, for one rank, for a signal.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selection=(-m "not slow")
if [ "${1:-}" = --everything ]; then selection=(); shift; fi
exec pytest --numprocesses "${PYTEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
