"""Random search on the problem; run from the folder `package`."""

import optuna
import optunahub

problem = optunahub.load_local_module("benchmarks/adq_quantization", registry_root=".").Problem()
study = optuna.create_study(
    directions=problem.directions, sampler=optuna.samplers.RandomSampler(seed=0)
)
study.optimize(problem, n_trials=100)
print(f"{problem.share_of_hypervolume(study):.3f} of the true hypervolume")
