"""timm's train script: torchrun --nproc-per-node 8 examples/timm_train.py PATH/TO/train.py DIR --opt arsg --lr 0.01

`import arsg_dist.timm` adds ARSG to timm's optimizers; the script itself stays as it is. Its other settings:
--opt-betas 0.999 0.99 --opt-eps 1e-3 --opt-kwargs mu=0.1 --weight-decay 1e-4.
"""

import runpy
import sys

import arsg_dist.timm  # noqa: F401

if len(sys.argv) < 2:
    sys.exit("give the path of timm's train.py, and its arguments")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
