import pytest

from adq_search.errors import SpaceError
from adq_search.job import Job, load_job, parse_amount, read_job

MINIMAL = "task: digits\n"


def test_a_job_survives_its_plain_form():
    text = """
    task: digits
    space:
      default: {weight_bits: [2, 4], input_bits: [4], schemes: [adq], ema_momenta: [0.9]}
      pinned: {first: 8, last: float}
    training: {epochs: 3, distillation: {weight: 0.3}}
    search: {trials: 5, budgets: {weight_bytes: 20KiB}, objectives: [kl, bops]}
    """
    job = load_job(text, what="the job")
    assert Job.model_validate(job.to_plain()) == job
    assert job.search.budgets == {"weight_bytes": 20480.0}
    assert [tuple(a) for a in job.search.axes] == [("kl", "minimize"), ("bops", "minimize")]
    assert job.search.cost_axis == "bops"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("trials: 3\n", "unknown key 'trials'"),
        (MINIMAL + "trainin: {}\n", "Did you mean 'training'"),
        (MINIMAL + "search: {trial: 3}\n", "unknown key 'search.trial'. Did you mean 'trials'"),
        (MINIMAL + "search: {trials: 0}\n", "search.trials.*greater than or equal to 1"),
        (MINIMAL + "search: {objectives: [accuracy, enrgy_pj]}\n", "Did you mean 'energy_pj'"),
        (MINIMAL + "search: {objectives: [accuracy]}\n", "one measured objective .* one cost"),
        (MINIMAL + "search: {objectives: [bops, bops, kl]}\n", "each objective stands once"),
        (MINIMAL + "search: {prior: fishr}\n", "Did you mean 'fisher'"),
        (MINIMAL + "search: {budgets: {weight_bits: 3}}\n", "no cost figure 'weight_bits'"),
        (MINIMAL + "search: {budgets: {weight_bytes: 20Kg}}\n", "no amount.*KiB"),
        (MINIMAL + "search: {budgets: {weight_bytes: -1}}\n", "must be positive"),
        (MINIMAL + "space: {default: {weight_bits: [1]}}\n", "greater than or equal to 2"),
        (MINIMAL + "training: {distillation: {temperature: 0}}\n", "temperature.*greater than 0"),
        ("task: [\n", "is no YAML"),
        ("- task\n", "must hold a mapping"),
        ("", "must hold a mapping"),
    ],
)
def test_wrong_jobs_get_one_sentence(text, match):
    with pytest.raises(SpaceError, match=match) as caught:
        load_job(text, what="the job file x.yaml")
    assert str(caught.value).startswith("The job file x.yaml")
    assert "\n" not in str(caught.value)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(SpaceError, match="absent.yaml cannot be read"):
        read_job(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("weight_bytes", "20KiB", 20 * 1024),
        ("weight_bytes", "1.5MB", 1.5e6),
        ("weight_bytes", 77, 77),
        ("energy_pj", "2uJ", 2e6),
        ("energy_pj", "3kpJ", 3e3),
        ("bops", "670M", 6.7e8),
        ("average_bits_inner", "2.81", 2.81),
    ],
)
def test_amounts_come_in_the_figures_own_unit(name, text, value):
    assert parse_amount(name, text) == pytest.approx(value)


def test_changes_are_checked_like_the_file():
    job = load_job(MINIMAL, what="the job")
    assert job.with_search(trials=3).search.trials == 3
    assert job.with_training(epochs=2).training.epochs == 2
    with pytest.raises(SpaceError, match=r"search\.trials"):
        job.with_search(trials=-3)
