#!/usr/bin/env python3
"""``timm-structdrop train`` from a clone: train a timm model with structured dropout.

python train.py --recipe digits-quickstart
torchrun --nproc-per-node 4 train.py --model resnet50_dropcluster --data-dir /data/imagenet
"""

from timm_structdrop.cli.train import main
from timm_structdrop.errors import run_command

if __name__ == "__main__":
    run_command(main)
