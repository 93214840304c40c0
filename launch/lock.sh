#!/usr/bin/env bash
# Writes requirements.lock: what launch/setup.sh installs from the package index, each file by its SHA-256.
#
#   launch/lock.sh      in a checkout whose set-up is complete and whose tests passed; needs the network, some minutes
#
# A package has several lines where machines with another C library get another file. Not in it: torch and torchvision,
# whose builds for CPU and CUDA have one version and different files; NVIDIA's libraries, which a CUDA build of torch
# brings; and the engines, which are compiled here from source releases that launch/build_engines.sh knows the digests of.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$PWD/.venv/bin/python
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
# Only the public index says what everybody gets: no files, indexes or settings of this machine.
unset PIP_FIND_LINKS PIP_EXTRA_INDEX_URL PIP_INDEX_URL PIP_NO_INDEX PIP_CONSTRAINT
export PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" -P - > "$work/wanted.txt" <<'PYTHON'
import importlib.metadata, re, sys
def plain(name): return re.sub("[-_.]+", "-", name).lower()
pinned = {plain(line.partition("==")[0]): line.strip() for line in open("constraints.txt") if re.match("[^#]+==", line)}
installed = {plain(package.name) for package in importlib.metadata.distributions()}
unpinned = installed - pinned.keys() - {"arsg-dist"}
print("lock: installed, and not in constraints.txt: ", *sorted(unpinned) or ["nothing"], file=sys.stderr)
for name in sorted(installed & pinned.keys() - {"torch", "torchvision", "deepspeed", "horovod"}):
    if not name.startswith("nvidia-"):
        print(pinned[name])
PYTHON
report() { "$python" -m pip install --quiet --dry-run --ignore-installed --no-deps -r "$work/wanted.txt" --report "$@"; }
report "$work/this.json"
# The oldest C library that torch's wheels run on, glibc 2.28.
platforms=(); for minor in $(seq 28 -1 5); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
report "$work/oldest.json" --only-binary=:all: --target "$work/none" --python-version 3.11 "${platforms[@]}"

"$python" -P - "$work"/this.json "$work"/oldest.json > requirements.lock <<'PYTHON'
import json, sys
files = {}
for report in sys.argv[1:]:
    for item in json.load(open(report))["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        files.setdefault(f"{name}=={version}", set()).add(item["download_info"]["archive_info"]["hashes"]["sha256"])
print("# Made by launch/lock.sh; Linux on x86-64, Python 3.11. The versions are those of constraints.txt.")
for package, digests in sorted(files.items(), key=lambda item: item[0].lower()):
    print(package, *(f"--hash=sha256:{digest}" for digest in sorted(digests)), sep=" \\\n    ")
PYTHON
