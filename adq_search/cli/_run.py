"""`adq-search run` and `adq-search report`."""

from __future__ import annotations

import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from adq_search.cli._progress import ShownProgress
from adq_search.cli._ranks import follow_to_the_end, launched, threads_each
from adq_search.cli._spaces import find_job
from adq_search.errors import AdqSearchError, SpaceError, did_you_mean
from adq_search.hosting import Host, HostOptions
from adq_search.job import Job
from adq_search.leading import leading
from adq_search.own_process import set_up_process
from adq_search.plan import Plan, plan
from adq_search.report import certainty, front_table, read_front, rebuild, within_budgets
from adq_search.results import write_outcome
from adq_search.session import prepare
from adq_search.training import threads_for

HOSTS = "adq_search.hosts"


def run(
    space: Annotated[str, typer.Argument(help="A search space's name, or a YAML file.")] = "digits",
    out: Annotated[Path | None, typer.Option(help="Folder of results [results/STUDY].")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study [the space's name].")] = None,
    trials: Annotated[int | None, typer.Option(help="Policies to train.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each trial.")] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help="Objective, repeatable: accuracy, energy_pj, ...")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="Limit on a cost, repeatable: weight_bytes=20KiB.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    pruner: Annotated[
        str | None, typer.Option(help="Who stops hopeless trials: front or none.")
    ] = None,
    replicates: Annotated[
        int | None, typer.Option(help="New seeds that the front is trained again with.")
    ] = None,
    warm_start: Annotated[
        bool | None, typer.Option(help="Begin trials from the nearest trained policy.")
    ] = None,
    host: Annotated[str, typer.Option(help="What runs the search: optuna or ray.")] = "optuna",
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL [a journal file in the folder].")
    ] = None,
    artifacts: Annotated[
        str | None, typer.Option(help="Weights for workers elsewhere: a folder, s3://BUCKET.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that train at once [1; with --address what fits]."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to run on, or auto [this machine alone].")
    ] = None,
    cpus_per_trial: Annotated[
        float, typer.Option(help="Processors that a Ray trial reserves.")
    ] = 1.0,
    gpus_per_trial: Annotated[
        float, typer.Option(help="GPUs that a Ray trial reserves; 0.5 shares one.")
    ] = 0.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a study.")] = False,
    dashboard: Annotated[
        bool | None,
        typer.Option(help="Notes and figures for optuna-dashboard [where it is installed]."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a worker [by the job's size].")
    ] = None,
) -> None:
    """Search for the Pareto front of quantization policies.

    Started by torchrun, the processes train each trial together.
    """
    start = time.perf_counter()
    console = Console()
    ranks = launched()
    if not ranks.is_first:
        set_up_process(threads or threads_each())
        follow_to_the_end(ranks)
        return
    job, name = find_job(space)
    job = _changed(
        job,
        budget,
        search={
            "trials": trials,
            "objectives": objective,
            "seed": seed,
            "pruner": pruner,
            "replicates": replicates,
        },
        training={"epochs": epochs, "warm_start": warm_start},
    )
    options = HostOptions(
        study or name,
        storage=storage,
        workers=workers or (1 if address is None else 0),
        resume=resume,
        artifacts=artifacts,
        dashboard=dashboard,
        address=address,
        cpus_per_trial=cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
    )
    folder = out or Path("results") / options.study
    runner = find_host(host)
    planned = plan(job)
    size = planned.summary.macs, job.training.batch_size
    set_up_process(threads or threads_for(*size, workers=max(1, options.workers)))
    if ranks.size > 1:
        _check_trains_here(host, options.workers)
        set_up_process(threads or threads_each())
    runner.check(planned, folder, options)
    _tell_what_is_reachable(console, planned)
    with ShownProgress(console) as progress:
        session = prepare(planned, folder, progress)
        with leading(session, ranks) as led:
            outcome = runner.run(led, options, progress)
        progress.update("report", 0, 1)
        report = write_outcome(session, outcome, options, started=start)
        progress.update("report", 1, 1)
    console.print(front_table(report))
    for sentence in certainty(report):
        console.print(sentence, highlight=False, soft_wrap=True)
    if report.budgets:
        console.print(within_budgets(report), highlight=False, soft_wrap=True)
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def report(folder: Annotated[Path, typer.Argument(help="Folder of a run's results.")]) -> None:
    """Rebuild report.html, front.svg and trials.csv from a run's folder."""
    console = Console()
    page = rebuild(folder)
    console.print(front_table(read_front(folder)))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _check_trains_here(host: str, n_workers: int) -> None:
    """Refuse data-parallel trials where a host would start processes of its own for them."""
    if host != "optuna" or n_workers != 1:
        msg = (
            "The processes of torchrun train together what the first one measures, but --host "
            f"{host} with {n_workers} workers measures in processes of its own. Take --host optuna "
            "--workers 1, and let others join by `torchrun ... -m adq_search worker`."
        )
        raise AdqSearchError(msg)


def _tell_what_is_reachable(console: Console, planned: Plan) -> None:
    """Print the size of the network and of the space, and the reach of every cost that matters."""
    search = planned.job.search
    reach = []
    for name in dict.fromkeys((search.cost_axis, *search.budgets)):
        lowest, highest = planned.cost_range(name)
        limit = f", at most {search.budgets[name]:.4g}" if name in search.budgets else ""
        reach.append(f"{name} from {lowest:.4g} to {highest:.4g}{limit}")
    console.print(
        f"{planned.task.name}: {len(planned.summary.layers)} layers, "
        f"{planned.summary.macs / 1e6:.2f} M MACs, {planned.summary.n_weights} weights; "
        f"{planned.space.n_policies:.3g} policies, {'; '.join(reach)}",
        highlight=False,
    )


def find_host(name: str) -> Host:
    """Return the host registered under a name.

    Raises:
        AdqSearchError: No such host, or its package is not installed.
    """
    found = {entry.name: entry for entry in entry_points(group=HOSTS)}
    if name not in found:
        msg = f"There is no host '{name}'. {did_you_mean(name, found)}"
        raise AdqSearchError(msg)
    host: Host = found[name].load()()
    return host


def _changed(
    job: Job, budgets: list[str] | None, search: dict[str, Any], training: dict[str, Any]
) -> Job:
    """Return the job with what the command line says instead of what the file says.

    Args:
        job: The file's.
        budgets: `name=amount`; they join the file's.
        search: Search settings; None stands for the file's.
        training: Training settings, likewise.
    """
    given = {key: value for key, value in search.items() if value is not None}
    if budgets:
        given["budgets"] = {**job.search.budgets, **dict(map(_pair, budgets))}
    if given:
        job = job.with_search(**given)
    given = {key: value for key, value in training.items() if value is not None}
    return job.with_training(**given) if given else job


def _pair(text: str) -> tuple[str, str]:
    name, equals, amount = text.partition("=")
    if not equals or not name or not amount:
        msg = f"A budget is written name=amount, like weight_bytes=20KiB, but this is '{text}'."
        raise SpaceError(msg)
    return name, amount
