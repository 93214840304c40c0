#!/usr/bin/env python3
"""Trains an image classifier with ARSG; the same as `arsg-imagenet train`.

deepspeed --num_accelerators 2 launch/train_imagenet.py \
    --deepspeed_config configs/deepspeed/zero1.json --config configs/digits.yaml
mpirun -np 2 --bind-to none python launch/train_imagenet.py --engine horovod --config configs/digits.yaml
python launch/train_imagenet.py --config configs/digits.yaml
"""

import sys

from arsg_dist.engine import end_process
from arsg_dist.imagenet.cli import train_command

if __name__ == "__main__":
    end_process(train_command(sys.argv[1:]))
