"""Optuna's storages by URL, waiting out a database that is restarted or out of reach."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy
from optuna.study import Study
from optuna.trial import FrozenTrial
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
)

from adq_search.errors import MissingExtraError, StorageError
from adq_search.plugins._outages import wait_out
from adq_search.plugins.optuna_database import BulkDatabase
from adq_search.plugins.optuna_journal import open_journal
from adq_search.plugins.optuna_lease import LeaseTerms

try:
    import grpc
except ImportError:  # the extra `grpc`
    grpc = None

#: How long who joins or resumes a study waits for a database that is being restarted.
RESTART_S = 60.0
#: The study of a run without a storage, in its folder.
JOURNAL = "study.journal"
_GRPC = "grpc://"
_DEFAULT_GRPC_PORT = 13000
#: How a proxy's answer says that its own database failed it.
_BEHIND_THE_PROXY = ("raised during the commit", "OperationalError")
#: What Optuna's cache of a database asks of it, beside the public operations.
_BEHIND_THE_CACHE = (
    "_create_new_trial",
    "_set_trial_param",
    "_get_trials",
    "_get_stale_trial_ids",
    "record_heartbeat",
)

Kind = TypeVar("Kind", bound=BaseStorage)


def open_storage(
    url: str,
    terms: LeaseTerms | None = None,
    on_stale: Callable[[Study, FrozenTrial], None] | None = None,
    *,
    patience_s: float = 0.0,
    is_there: bool = False,
) -> BaseStorage:
    """Open a storage that waits out outages.

    Args:
        url: Of a database; `grpc://host:port` of Optuna's proxy; or the path of a journal file.
        terms: Of the heartbeats in a database; None writes and judges none.
        on_stale: Told of each trial that was failed because its heartbeats ended.
        patience_s: Seconds to wait for a database that cannot be reached at once.
        is_there: A journal file must exist; otherwise a missing one is made.

    Raises:
        StorageError: The storage cannot be opened.
        MissingExtraError: The proxy needs a package that is not installed.
    """
    if is_there and "://" not in url and not Path(url).exists():
        msg = f"There is no journal file at {url}. Check the path."
        raise StorageError(msg)
    try:
        if url.startswith(_GRPC):
            return _open_proxy(url)
        if "://" not in url:
            return open_journal(Path(url))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return wait_out(
                lambda: _PatientDatabase(
                    url,
                    engine_kwargs={} if is_sqlite(url) else {"pool_pre_ping": True},
                    heartbeat_interval=None if terms is None else round(terms.interval_s),
                    grace_period=None if terms is None else round(terms.grace_s),
                    heartbeat_stale_trial_callback=on_stale,
                ),
                lambda error: patience_s > 0.0 and _database_is_out(error),
                patience_s=patience_s,
            )
    except MissingExtraError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        msg = f"The storage '{url}' cannot be opened: {detail}. Check the URL."
        raise StorageError(msg) from error


def is_sqlite(url: str) -> bool:
    """Whether a URL is that of an SQLite file."""
    return url.startswith("sqlite")


def refuse_sqlite(url: str, *, who: str) -> None:
    """Refuse to share an SQLite file.

    Raises:
        StorageError: Says why, and what to use.
    """
    if is_sqlite(url):
        msg = (
            f"SQLite locks its whole file, so {who} would fail on it. Use "
            "the journal file (leave --storage out), or a PostgreSQL or MySQL URL."
        )
        raise StorageError(msg)


def _open_proxy(url: str) -> GrpcStorageProxy:
    if grpc is None:
        msg = "A storage behind grpc:// needs grpcio. Install it: pip install 'adq-search[grpc]'"
        raise MissingExtraError(msg)
    host, _, port = url.removeprefix(_GRPC).rstrip("/").partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _PatientProxy(host=host, port=int(port or _DEFAULT_GRPC_PORT))


def _database_is_out(error: Exception) -> bool:
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, OperationalError | InterfaceError | PendingRollbackError):
        return True  # the last: Optuna asked again within a transaction whose connection was lost
    return isinstance(cause, DBAPIError) and cause.connection_invalidated


def _proxy_is_out(error: Exception) -> bool:
    if not isinstance(error, grpc.RpcError):
        return False
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return True
    detail = error.details() or ""
    return any(sign in detail for sign in _BEHIND_THE_PROXY)


def _patient(kind: type[Kind], is_outage: Callable[[Exception], bool]) -> type[Kind]:
    """Return a kind of storage each of whose operations is tried again during an outage.

    An outage may hide that an operation was done. A trial made twice is one whose worker never
    says its name, which is failed after the grace period; a state set twice is set.
    """
    names = [*BaseStorage.__abstractmethods__, *_BEHIND_THE_CACHE]
    waiting = {n: _waiting(getattr(kind, n), is_outage) for n in names if hasattr(kind, n)}
    return type(f"Patient{kind.__name__}", (kind,), waiting)


def _waiting(
    operation: Callable[..., Any], is_outage: Callable[[Exception], bool]
) -> Callable[..., Any]:
    @functools.wraps(operation)
    def call(*arguments: Any, **named: Any) -> Any:
        def again() -> Any:
            try:
                return operation(*arguments, **named)
            except UpdateFinishedTrialError:
                if operation.__name__ == "set_trial_state_values":
                    return True
                raise

        return wait_out(lambda: operation(*arguments, **named), is_outage, again=again)

    return call


_PatientDatabase = _patient(BulkDatabase, _database_is_out)
_PatientProxy = _patient(GrpcStorageProxy, _proxy_is_out)
