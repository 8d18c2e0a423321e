"""Samplers that studies here compare, by name: each takes a problem and a seed."""

import optuna

from adq_search.plugins.optuna_sampler import PolicySampler


def guided(problem, seed, *, has_prior=True):
    """Return our sampler for a simulated problem, which knows costs and prior."""
    return PolicySampler(
        problem.space,
        prior=problem.prior if has_prior else None,
        costs={"cost": problem.cost_rows},
        objectives=("accuracy", "cost"),
        seed=seed,
    )


PLAIN = {
    "random": lambda _, s: optuna.samplers.RandomSampler(seed=s),
    "TPE multivariate": lambda _, s: optuna.samplers.TPESampler(multivariate=True, seed=s),
    "NSGA-II": lambda _, s: optuna.samplers.NSGAIISampler(population_size=24, seed=s),
    "GP": lambda _, s: optuna.samplers.GPSampler(seed=s),
}
#: For studies of the rules that end trials and searches.
FEW = {"guide": guided} | {name: PLAIN[name] for name in ("TPE multivariate", "random")}
