#!/usr/bin/env bash
# Builds the wheels of the two engines against the torch, MPI and compiler on PATH, or takes them from a cache.
#
#   launch/build_engines.sh CACHE_DIR OUTPUT_DIR
#
#   ARSG_GPU=cuda|none            Horovod with NCCL, or for CPU tensors alone; default: with, where torch is a CUDA build
#                                 and this machine has nvcc and a GPU
#   HOROVOD_CUDA_HOME             CUDA toolkit; default CUDA_HOME, else what the nvcc on PATH says
#   HOROVOD_NCCL_HOME             NCCL with headers; default the one that torch's CUDA wheels bring (nvidia.nccl)
#   HOROVOD_BUILD_CUDA_CC_LIST    compute capabilities, e.g. 80,90; default those of the GPUs in this machine, else all of nvcc's
#   HOROVOD_...                   Horovod's other build variables, e.g. HOROVOD_GPU_ALLREDUCE, HOROVOD_WITHOUT_MPI
#
# Horovod 0.28.1 is patched in two places: it declares C++14 and torch needs C++20; and under Gloo its stall check knows
# of no ranks (a vector is reserved, not resized) and never fires. DeepSpeed gets its CPU operators compiled in: its
# run-time compiler would take minutes at the first start and leaves a lock when killed. Those for NVMe are among them
# where libaio and its headers are installed and no GPU is used; DeepSpeed 0.19.8 is patched in one place for it: its
# builder for CPUs forgets an operator's linker flags.
set -euo pipefail
cache=$1 output=$2
horovod=0.28.1 deepspeed=0.19.8
# Of the source releases on the package index.
horovod_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
deepspeed_sha256=9e491abd0827ea5c389dd702e15e11e13d83d904bac4a20d6c2a4cb37207a9af

die() { echo "build_engines: $*" >&2; exit 1; }

# shellcheck source=launch/wheel_shelf.sh
. "$(dirname "${BASH_SOURCE[0]}")/wheel_shelf.sh"
unusable=$(make_shelves "$cache") || die "$unusable"

work=$(mktemp -d); trap 'wait; rm -rf "$work"' EXIT

# The folder of its toolkit is said by nvcc itself: on PATH there may be a link to it or a script that calls it.
toolkit_of() {
    local said
    said=$("$1" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' || true)
    realpath -- "${said:-$(dirname "$(dirname "$1")")}"
}
nvcc=$(command -v nvcc || true)
cuda_home="${HOROVOD_CUDA_HOME:-${CUDA_HOME:-${nvcc:+$(toolkit_of "$nvcc")}}}"
gpu=${ARSG_GPU:-none}
if [ -z "${ARSG_GPU:-}" ] && python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    if [ -x "$cuda_home/bin/nvcc" ] && nvidia-smi -L >/dev/null 2>&1; then
        gpu=cuda
    else
        echo "setup: torch is a CUDA build, but there is no nvcc or no GPU here: Horovod is built without NCCL (ARSG_GPU=cuda insists)"
    fi
fi
if [ "$gpu" = cuda ]; then
    [ -x "$cuda_home/bin/nvcc" ] ||
        die "Horovod with NCCL needs the CUDA toolkit, and there is no '$cuda_home/bin/nvcc': put nvcc on PATH, or set HOROVOD_CUDA_HOME or ARSG_GPU=none"
    # torch looks for the toolkit too, by itself: both have to find the same one.
    export HOROVOD_CUDA_HOME=$cuda_home CUDA_HOME=$cuda_home
    read -r torch torch_cuda < <(python -c 'import torch; print(torch.__version__, torch.version.cuda or "")') || true
    [ -n "$torch_cuda" ] ||
        die "Horovod with NCCL needs a CUDA build of torch, and $torch is none: pip's own index has it (see PIP_INDEX_URL, PIP_FIND_LINKS), or set ARSG_GPU=none"
    nvcc_cuda=$("$cuda_home/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
    [ "${nvcc_cuda%%.*}" = "${torch_cuda%%.*}" ] ||
        die "torch $torch was built with CUDA $torch_cuda, and $cuda_home has CUDA ${nvcc_cuda:-of no known version}: set HOROVOD_CUDA_HOME to a toolkit of CUDA ${torch_cuda%%.*}"
    export HOROVOD_NCCL_HOME="${HOROVOD_NCCL_HOME:-$(python -c 'import nvidia.nccl as n; print(list(n.__path__)[0])' 2>/dev/null || true)}"
    [ -e "$HOROVOD_NCCL_HOME/include/nccl.h" ] ||
        die "no NCCL headers in '${HOROVOD_NCCL_HOME:-the Python package nvidia.nccl}': set HOROVOD_NCCL_HOME to an NCCL with include/nccl.h"
    # Horovod looks for libnccl.so, and the Python package has libnccl.so.2 alone. A link beside it, and no folder of
    # links elsewhere: Horovod's library looks for NCCL where it was linked.
    if ! compgen -G "$HOROVOD_NCCL_HOME/lib*/libnccl.so" >/dev/null && [ -e "$HOROVOD_NCCL_HOME/lib/libnccl.so.2" ]; then
        ln -s libnccl.so.2 "$HOROVOD_NCCL_HOME/lib/libnccl.so" ||
            die "$HOROVOD_NCCL_HOME/lib has libnccl.so.2 and no libnccl.so, which Horovod looks for, and cannot be written: set HOROVOD_NCCL_HOME to an NCCL that has both"
    fi
    export HOROVOD_GPU=CUDA
    # Horovod refuses HOROVOD_GPU_OPERATIONS beside the variables for single operations.
    compgen -e | grep -q '^HOROVOD_GPU_\(ALLREDUCE\|ALLGATHER\|BROADCAST\|ALLTOALL\|REDUCESCATTER\)$' ||
        export HOROVOD_GPU_OPERATIONS="${HOROVOD_GPU_OPERATIONS:-NCCL}"
    if [ -z "${HOROVOD_BUILD_CUDA_CC_LIST:-}" ] && command -v nvidia-smi >/dev/null; then
        found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -un | paste -sd, || true)
        [ -z "$found" ] || export HOROVOD_BUILD_CUDA_CC_LIST=$found
    fi
    # Horovod would ask the nvcc on PATH, which need not be this one, and takes an empty list for one.
    if [ -z "${HOROVOD_BUILD_CUDA_CC_LIST:-}" ]; then
        HOROVOD_BUILD_CUDA_CC_LIST=$("$cuda_home/bin/nvcc" --list-gpu-arch | sed -n 's/^compute_\([0-9]*\)$/\1/p' | paste -sd,)
        export HOROVOD_BUILD_CUDA_CC_LIST
    fi
    # What CMake says badly after a minute: a g++ too new for this nvcc, a GPU too old for it, a toolkit that does not link.
    echo 'int main() {}' > "$work/program.cu"
    targets=()
    for capability in ${HOROVOD_BUILD_CUDA_CC_LIST//,/ }; do
        targets+=("-gencode=arch=compute_$capability,code=sm_$capability")
    done
    compiled() { "$cuda_home/bin/nvcc" "$@" "$work/program.cu" >"$work/program.log" 2>&1; }
    if ! { compiled --dryrun "${targets[@]}" -c && compiled -o "$work/program" -lcudart; }; then
        remedy=""
        [ -e "$cuda_home/lib64/libcudart.so" ] || [ ! -e "$cuda_home/lib/libcudart_static.a" ] ||
            remedy="; NVIDIA's Python packages lack two links: (cd $cuda_home; ln -s lib lib64; cd lib; ln -s libcudart.so.* libcudart.so)"
        die "$cuda_home/bin/nvcc makes no program for HOROVOD_BUILD_CUDA_CC_LIST=$HOROVOD_BUILD_CUDA_CC_LIST: $(
            grep -iE 'error|fatal|cannot find' "$work/program.log" | head -1)$remedy"
    fi
fi

nvme=0 cpu=1
[ "$gpu" = none ] || cpu=0  # with a GPU nothing here uses them, and they would be compiled against CUDA
if [ "$gpu" = none ] && printf '#include <libaio.h>\nint main() { return io_queue_init(1, 0); }' |
    g++ -x c++ - -laio -o /dev/null 2>/dev/null; then
    nvme=1
fi

prefix=$(python -c 'import sys; print(sys.prefix)')  # differs between checkouts, and nothing in a wheel depends on it
built_against="$(python -c 'import sys, sysconfig, torch
print(sys.version, sysconfig.get_platform(), torch.__version__, torch.version.cuda)')
$(mpirun --version | head -1)
g++ $(g++ -dumpfullversion)
gpu=$gpu $( [ "$gpu" = cuda ] && "$cuda_home/bin/nvcc" --version | tail -1 || true )
cpu $(grep -m1 '^flags' /proc/cpuinfo | sha256sum)
$(env | grep -E '^HOROVOD_(GPU|CUDA|NCCL|BUILD|WITH|ROCM|CCL|MPICXX|ALLOW)' | sed "s|=$prefix/|=|" | sort || true)"

# cached NAME BUILD_FUNCTION [WITH]: BUILD_FUNCTION leaves one wheel in $work/NAME; its output goes to a log shown on
# failure. WITH is what that wheel alone depends on.
cached() {
    local name=$1 build=$2 made_of key shelf
    made_of="$built_against"$'\n'"$name ${!1}${3:+ $3}"$'\n'"$(declare -f "$build")"
    key=$(printf '%s' "$made_of" | sha256sum | cut -c1-16)
    shelf="$cache/$name-$key"
    if ! take_from_shelf "$shelf" "$output"; then
        echo "setup: compiling $name (minutes; kept in $shelf)"
        local log="$work/$name.log"
        mkdir -p "$work/$name"
        # A failure anywhere in the build shows as a missing wheel ('set -e' does not reach into a tested command).
        (cd "$work" && "$build" "$work/$name") >"$log" 2>&1 || true
        if ! compgen -G "$work/$name/*.whl" >/dev/null; then
            # The first errors: at the end there are setuptools' tracebacks alone.
            grep -m 3 -A 4 -E 'CMake Error|fatal|: error:|cannot find|Error:' "$log" >&2 || true
            tail -n 5 "$log" >&2
            cp "$log" "$cache/$name-failed.log"
            die "$name did not build; the whole log is in $cache/$name-failed.log"
        fi
        put_on_shelf "$shelf" "$work/$name" "$made_of"
        cp "$work/$name"/*.whl "$output/"
    fi
}

# source_of NAME: unpacks the source release and goes there, if its digest is the one above.
source_of() {
    local sha256=$1_sha256
    printf '%s==%s --hash=sha256:%s\n' "$1" "${!1}" "${!sha256}" > "$1.txt"
    python -m pip download --require-hashes --no-deps --no-build-isolation --no-binary :all: -r "$1.txt" &&
        tar xzf "$1-${!1}.tar.gz" && cd "$1-${!1}" || return
    # Horovod's part for torch takes any CUDA toolkit it comes across, and ends where that one is of no use.
    if [ "$1 $gpu" = "horovod none" ] && ! compgen -e | grep -q '^HOROVOD_GPU'; then
        sed -i 's/(CUDA_HOME is not None)/False/' cmake/Modules/FindPytorch.cmake
    fi
}

build_horovod() {
    source_of horovod || return
    sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/' CMakeLists.txt horovod/torch/CMakeLists.txt
    sed -i 's/global_ranks_\.reserve(size_)/global_ranks_.resize(size_)/' horovod/common/gloo/gloo_controller.cc
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    [ -n "${HOROVOD_WITHOUT_MPI:-}" ] || export HOROVOD_WITH_MPI=1
    [ -n "${HOROVOD_WITHOUT_GLOO:-}" ] || export HOROVOD_WITH_GLOO=1
    export CMAKE_POLICY_VERSION_MINIMUM=3.5 MAKEFLAGS="-j$(nproc)"
    # The linker wrote down where this environment's MPI, torch and NCCL lie; another checkout takes the wheel from the
    # shelf, and this one may be gone: its libraries look for them from where they lie themselves.
    python -m pip wheel --no-build-isolation --no-deps --wheel-dir . . && python -m wheel unpack --dest unpacked ./*.whl &&
        python -c 'import os, pathlib, subprocess, sys, sysconfig
for library in pathlib.Path().glob("unpacked/*/**/*.so"):
    installed_in = pathlib.Path(sysconfig.get_path("platlib"), *library.parts[2:-1])
    folders = subprocess.check_output(["patchelf", "--print-rpath", library], text=True).strip().split(":")
    relative = ["$ORIGIN/" + os.path.relpath(folder, installed_in) if folder.startswith(sys.prefix + "/") else folder
                for folder in folders if folder]
    subprocess.run(["patchelf", "--set-rpath", ":".join(relative), library], check=True)' &&
        python -m wheel pack --dest-dir "$1" unpacked/*
}

build_deepspeed() {
    source_of deepspeed || return
    sed -i 's/^\( *\)extra_compile_args=compile_args)/\1extra_compile_args=compile_args,\n\1extra_link_args=self.strip_empty_entries(self.extra_ldflags()))/' \
        op_builder/cpu/builder.py
    grep -q 'extra_link_args' op_builder/cpu/builder.py || return
    DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=$cpu DS_BUILD_CPU_ADAM=$cpu DS_BUILD_AIO=$nvme DS_BUILD_PIN_MEMORY=$nvme \
        DS_ENABLE_NINJA=1 MAX_JOBS=$(nproc) python -m pip wheel --no-build-isolation --no-deps --wheel-dir "$1" .
}

cached horovod build_horovod & horovod_build=$!   # side by side: each has parts that run on one core
cached deepspeed build_deepspeed "nvme=$nvme cpu=$cpu" & deepspeed_build=$!
wait "$horovod_build" && wait "$deepspeed_build"
