#!/usr/bin/env bash
# Creates .venv in the checkout with everything pinned: torch, an MPI, DeepSpeed, Horovod, the tools.
# Needs no root. Re-runnable: a finished set-up is recognised and skipped; a broken-off one goes on.
#
#   launch/setup.sh --first    only what arsg_dist needs on torch alone: nothing is compiled but its kernel
#   launch/setup.sh            PYTHON=python3.11         interpreter to use
#                              ARSG_CACHE_DIR=DIR        where built wheels are kept (default ~/.cache/arsg_dist)
#                              ARSG_GPU=cuda|none        Horovod with or without NCCL (docs/setup.md); kept until another is given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "setup: $*" >&2; exit 1; }

# ---- Is it done already? --------------------------------------------------------------------------
is_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }
find_python() {  # a name on PATH proves nothing: version managers leave shims that fail
    local name path
    for name in python3.11 python3 python; do
        path=$(command -v "$name") && is_311 "$path" && echo "$path" && return
    done
    command -v python3.11 || command -v python3 || true
}
PYTHON=${PYTHON:-$(find_python)}
[ -n "$PYTHON" ] || die "no python3 found; install Python 3.11 with its venv module and headers, or set PYTHON=/path/to/python3.11"
inputs=(constraints.txt requirements.lock pyproject.toml setup.py launch/setup.sh launch/build_engines.sh launch/wheel_shelf.sh)
[ -d arsg_dist/optim/kernels/csrc ] && inputs+=(arsg_dist/optim/kernels/csrc/*)
libaio=$([ -e /usr/include/libaio.h ] && echo yes || echo no)  # installed later, DeepSpeed is built anew with its operators for NVMe
stamp=.venv/.setup-complete
first_stamp=.venv/.setup-first
# What was asked for once holds for the next 'make test' as well: without it that would put another Horovod in place.
if [ -z "${ARSG_GPU:-}" ] && [ -f "$first_stamp" ] && [[ "$(cat "$first_stamp")" =~ \ ARSG_GPU=([a-z]+)\  ]]; then
    export ARSG_GPU=${BASH_REMATCH[1]}
fi
state="$(cat "${inputs[@]}" | sha256sum | cut -d' ' -f1) $("$PYTHON" -V 2>&1) ARSG_GPU=${ARSG_GPU:-} libaio=$libaio $PWD"
is_done() { [ -f "$1" ] && [ "$(cat "$1")" = "$state" ]; }
case "${1:-}" in
    "") ;;
    --first) if is_done "$first_stamp"; then exit 0; fi ;;
    *) die "$1 is not known; there is --first" ;;
esac
if is_done "$stamp"; then exit 0; fi

# ---- Everything that can be missing is said here, before anything is created ----------------------
is_311 "$PYTHON" ||
    die "$PYTHON is $("$PYTHON" -V 2>&1 | cut -d' ' -f2); the pinned versions are for Python 3.11: install it or set PYTHON=/path/to/python3.11"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$PYTHON has no venv module; install it (Debian, Ubuntu: python3.11-venv)"
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    die "Python.h is missing; install Python's headers (Debian, Ubuntu: python3.11-dev)"
command -v make >/dev/null || die "make is missing; install it (Debian, Ubuntu: build-essential)"
command -v g++ >/dev/null || die "g++ is missing; install g++ 11 or newer (Debian, Ubuntu: build-essential)"
echo '#include <concepts>' | g++ -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
    die "g++ $(g++ -dumpversion) cannot compile C++20, which torch's headers need; install g++ 11 or newer"
cache=${ARSG_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/arsg_dist}
. launch/wheel_shelf.sh
unusable=$(make_shelves "$cache") || die "$unusable"
[ -w . ] || die "cannot write to $PWD; clone into a directory of yours"
need_gib=5; [ "${ARSG_GPU:-}" = cuda ] && need_gib=20
for place in . "$cache" "${TMPDIR:-/tmp}"; do
    free_kib=$(df -Pk "$place" | awk 'NR==2 {print $4}')
    [ "$free_kib" -ge $((need_gib * 1024 * 1024)) ] ||
        die "$(df -Pk "$place" | awk 'NR==2 {print $6}') has $((free_kib / 1024)) MiB free and the set-up needs $need_gib GiB; free space, or move TMPDIR / ARSG_CACHE_DIR / the checkout"
done
case "${ARSG_GPU:-none}" in
    none) ;;
    cuda)
        cuda_home=${HOROVOD_CUDA_HOME:-${CUDA_HOME:-}}
        if [ -n "$cuda_home" ]; then
            [ -x "$cuda_home/bin/nvcc" ] || die "there is no $cuda_home/bin/nvcc: set CUDA_HOME or HOROVOD_CUDA_HOME to the CUDA toolkit, or neither where nvcc is on PATH"
        else
            command -v nvcc >/dev/null || die "ARSG_GPU=cuda needs the CUDA toolkit: put nvcc on PATH, or set CUDA_HOME"
        fi ;;
    *) die "ARSG_GPU=$ARSG_GPU is not known; use ARSG_GPU=cuda or leave it unset" ;;
esac

# ---- One set-up at a time in this checkout --------------------------------------------------------
exec 9>.setup.lock
flock -n 9 || { echo "setup: another set-up is running in this checkout, waiting for it"; flock 9; }

rm -f "$stamp"
if ! is_311 .venv/bin/python; then
    rm -rf .venv
    "$PYTHON" -m venv .venv
fi
export PATH="$PWD/.venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT="$PWD/constraints.txt"
pip() { .venv/bin/python -m pip --quiet "$@"; }
wheels=$(mktemp -d); trap 'rm -rf "$wheels"' EXIT

# ---- First what is quick: the method on torch alone ------------------------------------------------
# torch, torchvision and the extra `imagenet` with everything they need (tests/packaging/test_setup.py), and the build's tools.
first=(
    absl-py cloudpickle contourpy cycler filelock fonttools fsspec grpcio Jinja2 joblib kiwisolver Markdown MarkupSafe matplotlib mpmath
    narwhals networkx numpy packaging pillow protobuf pyparsing python-dateutil PyYAML safetensors scikit-learn scipy
    setuptools sympy tensorboard tensorboard-data-server threadpoolctl tqdm typing_extensions tzdata Werkzeug wheel
)
if ! is_done "$first_stamp"; then
    echo "setup: torch and what arsg_dist needs, in $PWD/.venv, each file with the digest in requirements.lock"
    sed -n '/^pip==/,/[^\]$/p' requirements.lock > "$wheels/pip.txt"  # first, since it does not replace itself well midway
    pip install --require-hashes --no-deps -r "$wheels/pip.txt"
    for name in "${first[@]}"; do sed -n "/^$name==/,/[^\\]$/p" requirements.lock; done > "$wheels/first.txt"
    pip install --require-hashes --no-deps -r "$wheels/first.txt"
    pip install torch==2.13.0 torchvision==0.28.0  # their builds for CPU and CUDA have one version and other digests
    echo "setup: arsg_dist"
    pip install --no-build-isolation --no-deps -e .
    printf '%s\n' "$state" > "$first_stamp"
fi
if [ "${1:-}" = --first ]; then exit 0; fi

# ---- Then the engines ------------------------------------------------------------------------------
echo "setup: Open MPI, build tools and everything else, each file with the digest in requirements.lock"
pip install --require-hashes --no-deps -r requirements.lock
echo "setup: DeepSpeed and Horovod (the first time takes some minutes: they are compiled)"
launch/build_engines.sh "$cache" "$wheels"
# By name: pip would keep an engine of the same version that was built otherwise (without NCCL, without a patch).
pip install --no-deps --force-reinstall "$wheels"/*.whl
.venv/bin/python -m pip check
.venv/bin/python -c 'import horovod.torch' > /dev/null || die "Horovod does not load: remove $cache and start again"
printf '%s\n' "$state" > "$stamp"
echo "setup: done; 'source .venv/bin/activate' puts python, deepspeed, horovodrun and mpirun on PATH"
