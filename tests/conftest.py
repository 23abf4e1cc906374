"""One thread a test process: several run side by side, and threads that wait for each other slow all of them down."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
torch.set_num_threads(1)
