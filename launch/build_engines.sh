#!/usr/bin/env bash
# Builds the wheels of the two engines against the torch, MPI and compiler on PATH, or takes them from a cache.
#
#   launch/build_engines.sh CACHE_DIR OUTPUT_DIR         ARSG_GPU=cuda: Horovod with NCCL (not yet run)
#
# Horovod 0.28.1 declares C++14 and torch needs C++20, hence the one-line patch. DeepSpeed gets its CPU operators
# compiled in: its run-time compiler would take minutes at the first start and leaves a lock when killed.
set -euo pipefail
cache=$1 output=$2
horovod=0.28.1 deepspeed=0.19.8

die() { echo "build_engines: $*" >&2; exit 1; }

built_against="$(python -c 'import sys, sysconfig, torch
print(sys.version, sysconfig.get_platform(), torch.__version__, torch.version.cuda)')
$(mpirun --version | head -1)
g++ $(g++ -dumpfullversion)
gpu=${ARSG_GPU:-none} $( [ "${ARSG_GPU:-}" = cuda ] && nvcc --version | tail -1 || true )
cpu $(grep -m1 '^flags' /proc/cpuinfo | sha256sum)
$(sha256sum < "${BASH_SOURCE[0]}")"
key=$(printf '%s' "$built_against" | sha256sum | cut -c1-16)

work=$(mktemp -d); trap 'wait; rm -rf "$work"' EXIT

# cached NAME BUILD_FUNCTION: BUILD_FUNCTION leaves one wheel in $work/NAME; its output goes to a log shown on failure.
cached() {
    local name=$1 build=$2 shelf="$cache/$1-$key"
    if ! compgen -G "$shelf/*.whl" >/dev/null; then
        echo "setup: compiling $name (minutes; kept in $shelf)"
        local log="$work/$name.log"
        mkdir -p "$work/$name"
        # A failure anywhere in the build shows as a missing wheel ('set -e' does not reach into a tested command).
        (cd "$work" && "$build" "$work/$name") >"$log" 2>&1 || true
        if ! compgen -G "$work/$name/*.whl" >/dev/null; then
            tail -n 40 "$log" >&2
            cp "$log" "$cache/$name-failed.log"
            die "$name did not build; the whole log is in $cache/$name-failed.log"
        fi
        mkdir -p "$shelf.partial.$$"
        cp "$work/$name"/*.whl "$shelf.partial.$$/"
        printf '%s\n' "$built_against" > "$shelf.partial.$$/built-against.txt"
        mv -T "$shelf.partial.$$" "$shelf" 2>/dev/null || rm -rf "$shelf.partial.$$"  # another set-up was first
    fi
    cp "$shelf"/*.whl "$output/"
}

build_horovod() {
    python -m pip download --no-deps --no-build-isolation --no-binary :all: "horovod==$horovod" || return
    tar xzf "horovod-$horovod.tar.gz" && cd "horovod-$horovod" || return
    sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/' CMakeLists.txt horovod/torch/CMakeLists.txt
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1
    export HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    export CMAKE_POLICY_VERSION_MINIMUM=3.5 MAKEFLAGS="-j$(nproc)"
    if [ "${ARSG_GPU:-}" = cuda ]; then
        # torch's CUDA wheels bring NCCL and its headers as the Python package nvidia.nccl.
        export HOROVOD_GPU_OPERATIONS=NCCL
        export HOROVOD_CUDA_HOME="${HOROVOD_CUDA_HOME:-$(dirname "$(dirname "$(command -v nvcc)")")}"
        export HOROVOD_NCCL_HOME="${HOROVOD_NCCL_HOME:-$(python -c 'import nvidia.nccl as n; print(list(n.__path__)[0])')}"
    fi
    python -m pip wheel --no-build-isolation --no-deps --wheel-dir "$1" .
}

build_deepspeed() {
    DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 DS_BUILD_CPU_ADAM=1 \
        python -m pip wheel --no-build-isolation --no-deps --no-binary deepspeed --wheel-dir "$1" "deepspeed==$deepspeed"
}

cached horovod build_horovod & horovod_build=$!   # side by side: DeepSpeed compiles on one core
cached deepspeed build_deepspeed & deepspeed_build=$!
wait "$horovod_build" && wait "$deepspeed_build"
