#!/usr/bin/env bash
# Runs the tests: the core by default, everything that can run on this machine with --everything.
# Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selection=(-m "not slow")
if [ "${1:-}" = --everything ]; then selection=(); shift; fi
exec pytest "${selection[@]}" "$@"
