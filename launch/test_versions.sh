#!/usr/bin/env bash
# Tests the wheel in fresh environments with other versions of torch and Python; prints a row of docs/setup.md's table for each.
#
#   launch/test_versions.sh [TORCH/PYTHON ...]     for example 2.6.0/3.11 2.11.0/3.12 latest/3.13, which is the default
#
#   TESTS="FILE ..."     what pytest gets; default the optimizer, the theory, ddp, fsdp and the checkpoints, not the slow ones
#
# Environments are kept below .versions/ (some GB each): torch comes from the package index, where its builds for Linux on
# x86-64 are for CUDA; on a machine without a GPU they are tested as such. A Python that is not on PATH is a failure, said
# in one line. The wheel is that in dist/, or made by launch/dist.sh; its environment has no compiler on PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
die() { echo "test_versions: $*" >&2; exit 1; }
rows=("$@"); [ $# -gt 0 ] || rows=(2.6.0/3.11 2.11.0/3.12 latest/3.13)
tests=${TESTS:-tests/optim tests/theory tests/ddp tests/fsdp tests/checkpoint/test_store.py tests/checkpoint/test_format.py}
compgen -G 'dist/*.whl' > /dev/null || launch/dist.sh
wheel=$(echo dist/*.whl)

# The tests without the package beside them: what they import is the wheel.
checkout=$PWD/.versions/checkout
rm -rf "$checkout"
mkdir -p "$checkout"
cp -r tests configs docs launch benchmarks README.md pyproject.toml "$checkout"

# Everything on PATH but compilers.
tools=$PWD/.versions/bin
rm -rf "$tools"
mkdir -p "$tools"
for tool in bash cat env git grep head ldconfig ls mkdir ps rm sh uname; do
    found=$(command -v "$tool") && ln -s "$found" "$tools/$tool"
done

# Ends where an installation has replaced torch.
kept() {
    local after
    after=$("$home/bin/python" -c 'import torch; print(torch.__version__)')
    [ "$before" = "$after" ] || die "installing $1 replaced torch $before by $after"
}

failed=()
for row in "${rows[@]}"; do
    torch=${row%/*} python=python${row#*/}
    home=$PWD/.versions/torch$torch-$python
    "$python" -c 'import venv' 2> /dev/null || die "there is no working $python on PATH for $row"
    [ -x "$home/bin/python" ] || "$python" -m venv "$home"
    pip() { "$home/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
    if [ "$torch" = latest ]; then pip install torch; else pip install "torch==$torch"; fi
    before=$("$home/bin/python" -c 'import torch; print(torch.__version__)')
    pip install --force-reinstall --no-deps "$wheel"
    pip install "$wheel"
    kept "$wheel"
    # torchvision asks for one torch exactly, and pip takes the newest torchvision: who wants the program names his torch.
    pip install "${wheel}[imagenet]" "torch==${before%%+*}" hypothesis pytest pytest-timeout pytorch_optimizer qhoptim timm
    kept "${wheel}[imagenet]"
    # Triton before 3.7 interprets kernels with an older NumPy only.
    if "$home/bin/python" -c 'import triton, sys; sys.exit(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))' 2> /dev/null; then
        pip install 'numpy<2.4'
    fi
    log=$PWD/.versions/torch$torch-$python.log
    # shellcheck disable=SC2086  # several files
    (cd "$checkout" && PATH="$home/bin:$tools" python -m pytest -q -p no:cacheprovider -m "not slow" $tests) > "$log" 2>&1 || failed+=("$row")
    result=$(grep -aE '^[0-9].* in [0-9.]+s' "$log" | tail -1 || true)
    "$home/bin/python" - "${result:-no test ran, see $log}" <<'PYTHON'
import datetime, platform, sys, torch
build = f"CUDA {torch.version.cuda}, {'a GPU' if torch.cuda.is_available() else 'no GPU'}" if torch.version.cuda else "CPU"
print(f"| {torch.__version__.partition('+')[0]} ({build}) | {platform.python_version()} | {datetime.date.today()} | {sys.argv[1].strip('= ')} |")
PYTHON
done
[ ${#failed[@]} = 0 ] || die "failed: ${failed[*]}; the logs are in .versions/"
