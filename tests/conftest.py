"""Two cores for everybody: each test process uses one. The same examples at every run."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)

# HYPOTHESIS_PROFILE=explore draws new examples: for hunting, never for judging a commit.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
