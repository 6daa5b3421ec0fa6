"""What holds for all tests."""

import torch

# The models are tiny: more threads would only wait for one another.
torch.set_num_threads(1)
