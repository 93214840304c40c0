#!/usr/bin/env bash
# Trains configs/digits.yaml on this machine three times: in one process on torch alone, as soon as that can run; then the
# engines are set up, and it is trained by several ranks under the deepspeed launcher with ZeRO-1, and under Horovod.
#
#   launch/quickstart.sh [SETTING ...]     for example --epochs 3; RANKS=4 for another number of ranks
#
# Ranks: one per GPU, 2 on a machine without.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
launch/setup.sh --first
ranks=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
runs=runs/quickstart-$(date +%Y%m%d-%H%M%S)
as_root=(); [ "$(id -u)" = 0 ] && as_root=(--allow-run-as-root)

echo "== one process, torch alone"
python launch/train_imagenet.py --engine single --config configs/digits.yaml --output "$runs/single" "$@"

launch/setup.sh
echo "== deepspeed, ZeRO-1, $ranks ranks"
deepspeed --num_accelerators "$ranks" launch/train_imagenet.py \
    --deepspeed_config configs/deepspeed/zero1.json \
    --config configs/digits.yaml --output "$runs/deepspeed-zero1" "$@"

echo "== Horovod, $ranks ranks"
mpirun "${as_root[@]}" --oversubscribe --bind-to none -np "$ranks" \
    python launch/train_imagenet.py --engine horovod \
    --config configs/digits.yaml --output "$runs/horovod" "$@"

python -P - "$runs" <<'PYTHON'
import json, pathlib, sys
for run in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "epoch"][-1]
    print(f"{run}: validation accuracy {last['val_top1']:.2%} after {last['epoch']} epochs")
PYTHON
