#!/usr/bin/env bash
# Asks the public databases for known vulnerabilities of every version in constraints.txt. Needs the network, so that CI
# does not do it. pip-audit is installed for the occasion, beside nothing of ours. Other arguments go to pip-audit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
.venv/bin/python -m venv "$work/venv"
"$work/venv/bin/python" -m pip --quiet --disable-pip-version-check install pip-audit==2.10.1
"$work/venv/bin/pip-audit" --requirement constraints.txt --no-deps --disable-pip "$@"
