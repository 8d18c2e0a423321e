"""What workers elsewhere need of a session, published in the study and read back from it.

Small values are the study's user attributes; weights and other files lie in one of Optuna's
artifact stores, which the study names. Every file is checked against its SHA-256 when read.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import yaml
from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.study import Study
from optuna.trial import Trial

from adq_search.errors import AdqSearchWarning, MissingExtraError, StorageError
from adq_search.files import write_atomic, write_json
from adq_search.job import Job
from adq_search.plan import check_fingerprint, plan
from adq_search.plugins._code import check_code, code_fingerprint
from adq_search.plugins._outages import disk_is_out, wait_out
from adq_search.plugins.optuna_objective import FINGERPRINT
from adq_search.session import SENSITIVITY_FILE, Session, reopen
from adq_search.trial import fingerprint_of, weights_of
from adq_search.validation import validated

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

try:
    import boto3
except ImportError:  # the extra `s3`
    boto3 = None

JOB = "adq_search.job"
CODE = "adq_search.code"
_TEACHER = "adq_search.teacher"
_PLACE = "adq_search.artifacts"
_FILES = "adq_search.files"
_SESSION_FILES = ("session.json", "teacher.safetensors", SENSITIVITY_FILE)
_HARDWARE = "hardware"


def absolute_place(place: str) -> str:
    """Return where artifacts go as every machine can read it: `s3://...`, or an absolute path."""
    return place if "://" in place else str(Path(place).resolve())


def open_store(place: str) -> ArtifactStore:
    """Open an artifact store.

    Args:
        place: A folder, or `s3://bucket`, with `?endpoint=URL` for a server that is not Amazon's.

    Raises:
        StorageError: Neither of both.
        MissingExtraError: S3 needs boto3.
    """
    if "://" not in place:
        return FileSystemArtifactStore(place)
    parts = urlsplit(place)
    if parts.scheme != "s3" or not parts.netloc or parts.path.strip("/"):
        msg = (
            f"Artifacts go to a folder or to s3://bucket[?endpoint=URL], but this is '{place}'. "
            "Give one of both."
        )
        raise StorageError(msg)
    if boto3 is None:
        msg = "Artifacts in s3:// need boto3. Install it: pip install 'adq-search[s3]'"
        raise MissingExtraError(msg)
    endpoint = parse_qs(parts.query).get("endpoint", [None])[0]
    return Boto3ArtifactStore(parts.netloc, boto3.client("s3", endpoint_url=endpoint))


def store_of(study: Study) -> ArtifactStore:
    """Open the store that a study names."""
    return open_store(_published(study)[_PLACE])


def upload(store: ArtifactStore, file: Path, owner: Study | Trial) -> dict[str, str]:
    """Copy a file into the store, attached to a study or trial; return how to find it again."""
    artifact = wait_out(
        lambda: upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=owner),
        disk_is_out,
    )
    return {"artifact_id": artifact, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def download(store: ArtifactStore, found: Mapping[str, str], file: Path) -> None:
    """Copy an artifact to a file.

    Raises:
        StorageError: It is not in the store, or is not what was uploaded.
    """

    def write(temporary: Path) -> None:
        with store.open_reader(found["artifact_id"]) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target)
        if hashlib.sha256(temporary.read_bytes()).hexdigest() != found["sha256"]:
            msg = (
                f"The artifact of {file.name} ({found['artifact_id']}) is damaged: its SHA-256 is "
                "not that of the file that was uploaded. Restore it from a copy."
            )
            raise StorageError(msg)

    try:
        wait_out(lambda: write_atomic(file, write), disk_is_out)
    except ArtifactNotFound as error:
        msg = (
            f"The artifact store has no {file.name} ({found['artifact_id']}). Let this machine "
            "reach the store of the run, or start the run with --artifacts s3://bucket."
        )
        raise StorageError(msg) from error


def publish(study: Study, session: Session, place: str) -> None:
    """Write into the study what `fetch_session` reads, unless it is there.

    Warns (`AdqSearchWarning`) where the study was begun with other code.

    Raises:
        StorageError: The study's full-precision network is another than the session's.
    """
    plan = session.plan
    attributes = study.user_attrs
    code = code_fingerprint(plan.job.task)
    teacher = fingerprint_of(weights_of(session.teacher.network))
    if JOB in attributes:
        if attributes[_TEACHER] != teacher:
            msg = (
                f"Study '{study.study_name}' was begun with other weights of the full-precision "
                f"network ({attributes[_TEACHER]} there, {teacher} in {session.folder}). Go on in "
                "the folder it was begun in, or join it with `adq-search worker`."
            )
            raise StorageError(msg)
        if attributes[CODE] != code:
            study.set_user_attr(CODE, code)
            msg = (
                f"Study '{study.study_name}' goes on with other code than it was begun with "
                f"({attributes[CODE]} then, {code} now): its trials may not compare. To be sure, "
                "begin another --study."
            )
            warnings.warn(msg, AdqSearchWarning, stacklevel=2)
        if attributes[JOB] != plan.job.to_plain():  # what may change, as `trials` may
            study.set_user_attr(JOB, plan.job.to_plain())
        return
    if "://" not in place:
        Path(place).mkdir(parents=True, exist_ok=True)
    store = open_store(absolute_place(place))
    files = {name: session.folder / name for name in _SESSION_FILES}
    files |= _hardware_files(plan.job)
    found = {n: upload(store, file, study) for n, file in files.items() if file.exists()}
    study.set_user_attr(_FILES, found)
    study.set_user_attr(_PLACE, absolute_place(place))
    study.set_user_attr(_TEACHER, teacher)
    study.set_user_attr(CODE, code)
    study.set_user_attr(JOB, plan.job.to_plain())  # last: who finds it finds the rest


def fetch_session(study: Study, folder: Path) -> Session:
    """Make a study's session ready in a folder of another machine.

    Raises:
        StorageError: Nothing was published, a file is missing or damaged, or code, data, network
            or weights are others here.
    """
    attributes = _published(study)
    store = open_store(attributes[_PLACE])
    for name, found in attributes[_FILES].items():
        download(store, found, folder / name)
    job = validated(Job, attributes[JOB], StorageError, what="the study's job")
    hardware = next(
        (n for n in attributes[_FILES] if n.startswith(f"{_HARDWARE}/") and not n.endswith(".csv")),
        None,
    )
    if hardware is not None:
        job = job.with_search(hardware=str(folder / hardware))
    where = f"study '{study.study_name}'"
    planned = plan(job)
    check_code(attributes[CODE], code_fingerprint(job.task), where=where)
    check_fingerprint(attributes[FINGERPRINT], planned.fingerprint, where=where)
    write_json(folder / "job.json", job.to_plain())
    session = reopen(folder, planned)
    teacher = fingerprint_of(weights_of(session.teacher.network))
    if teacher != attributes[_TEACHER]:
        msg = (
            f"The {where} distils from weights {attributes[_TEACHER]}, but its artifact store "
            f"gave {teacher}. Restore the store from a copy."
        )
        raise StorageError(msg)
    return session


def _published(study: Study) -> dict[str, Any]:
    attributes = study.user_attrs
    if JOB not in attributes:
        msg = (
            f"Study '{study.study_name}' has published nothing to join. Start it with "
            "`adq-search run --storage URL`, and wait until its first trial begins."
        )
        raise StorageError(msg)
    return attributes


def _hardware_files(job: Job) -> dict[str, Path]:
    """Return a hardware file of the user's own, and the latency table it names beside it."""
    file = Path(job.search.hardware)
    if not file.is_file():
        return {}
    files = {f"{_HARDWARE}/{file.name}": file}
    table = (yaml.safe_load(file.read_text(encoding="utf-8")).get("latency_table") or {}).get(
        "file"
    )
    if table is not None and not Path(table).is_absolute():
        files[f"{_HARDWARE}/{table}"] = file.parent / table
    return files
