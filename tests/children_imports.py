"""What the process that children are forked from has imported."""

import timm  # noqa: F401
import torch
from script import load_script

import timm_structdrop
import timm_structdrop.cli.list
import timm_structdrop.evaluation  # noqa: F401

torch.set_num_threads(1)
load_script("train")
load_script("validate")
