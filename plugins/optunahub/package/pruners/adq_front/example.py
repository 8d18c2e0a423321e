"""Prune a study with two objectives; run from the folder `package`."""

import optuna
import optunahub

module = optunahub.load_local_module("pruners/adq_front", registry_root=".")
pruner = module.FrontPruner(rungs=(2, 4))


def objective(trial: optuna.Trial) -> tuple[float, float]:
    """Train something whose cost is known before."""
    width = trial.suggest_int("width", 1, 8)
    skill = trial.suggest_float("skill", 0.0, 1.0)
    loss = float("inf")
    for epoch in range(1, 9):
        loss = (2.0 - skill) / width + 1.0 / epoch
        if pruner.should_stop(trial, epoch, loss, known=[width]):
            raise optuna.TrialPruned
    return loss, width


study = optuna.create_study(directions=["minimize", "minimize"])
study.optimize(objective, n_trials=40)
print(pruner.false_stops(study))
