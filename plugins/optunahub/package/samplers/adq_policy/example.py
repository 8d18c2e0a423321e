"""Search the published-sensitivity problem; run from the folder `package`."""

import optuna
import optunahub

sampler_module = optunahub.load_local_module("samplers/adq_policy", registry_root=".")
problem_module = optunahub.load_local_module("benchmarks/adq_quantization", registry_root=".")

problem = problem_module.Problem(seed=0)
sampler = sampler_module.PolicySampler(problem.space, prior=problem.prior, seed=0)
study = optuna.create_study(directions=problem.directions, sampler=sampler)
study.optimize(problem, n_trials=50)
print(f"{problem.share_of_hypervolume(study):.3f} of the true hypervolume")
