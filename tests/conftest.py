"""Two cores for everybody: each test process uses one."""

import torch

torch.set_num_threads(1)
