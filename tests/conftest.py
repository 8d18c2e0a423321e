"""Two cores for everybody: each test process uses one. The same examples at every run."""

import os
import signal

import torch
from hypothesis import settings

torch.set_num_threads(1)

# A shell that runs the tests in the background has them ignore Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# HYPOTHESIS_PROFILE=explore draws new examples: for hunting, never for judging a commit.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
