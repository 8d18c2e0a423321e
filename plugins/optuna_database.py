"""Optuna's storage in a database, whose trials made from a template are written in few statements.

Optuna numbers trials under a lock on their study, and asks the database three times for each
parameter of a template while it holds it. That lock bounds how many trials a second a study takes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy.orm import Session

#: SQLite takes 2000 columns in a row, PostgreSQL 1664.
_NAMES_A_QUERY = 500


class BulkDatabase(RDBStorage):
    """Optuna's storage, with one statement for all parameters of a template and two for attributes.

    What is written, and what is refused, is what Optuna writes and refuses.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._distributions: dict[int, dict[str, BaseDistribution]] = {}

    def delete_study(self, study_id: int) -> None:
        """Delete a study and forget its distributions: SQLite gives its number to another."""
        super().delete_study(study_id)
        self._distributions.pop(study_id, None)

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> models.TrialModel:
        if template_trial is None:
            return super()._get_prepared_new_trial(study_id, None, session)
        bare = copy.copy(template_trial)
        bare.params, bare.distributions, bare.user_attrs, bare.system_attrs = {}, {}, {}, {}
        trial = super()._get_prepared_new_trial(study_id, bare, session)
        self._check_distributions(study_id, template_trial.distributions, session)
        _insert_all(
            session,
            models.TrialParamModel,
            (
                {
                    "trial_id": trial.trial_id,
                    "param_name": name,
                    "param_value": template_trial.distributions[name].to_internal_repr(value),
                    "distribution_json": distribution_to_json(template_trial.distributions[name]),
                }
                for name, value in template_trial.params.items()
            ),
        )
        for kind, attributes in (
            (models.TrialUserAttributeModel, template_trial.user_attrs),
            (models.TrialSystemAttributeModel, template_trial.system_attrs),
        ):
            rows = (
                {"trial_id": trial.trial_id, "key": key, "value_json": json.dumps(value)}
                for key, value in attributes.items()
            )
            _insert_all(session, kind, rows)
        return trial

    def _check_distributions(
        self, study_id: int, distributions: dict[str, BaseDistribution], session: Session
    ) -> None:
        """Compare distributions with those that the study's parameters have.

        Only what the database has is remembered: what this trial brings may be rolled back.

        Raises:
            ValueError: One is of another kind.
        """
        known = self._distributions.setdefault(study_id, {})
        unknown = [name for name in distributions if name not in known]
        for start in range(0, len(unknown), _NAMES_A_QUERY):
            names = unknown[start : start + _NAMES_A_QUERY]
            found = session.execute(sqlalchemy.select(*(_earlier(study_id, n) for n in names)))
            known |= {
                name: json_to_distribution(written)
                for name, written in zip(names, found.one(), strict=True)
                if written is not None
            }
        for name, distribution in distributions.items():
            if name in known:
                check_distribution_compatibility(known[name], distribution)


def _earlier(study_id: int, name: str) -> sqlalchemy.ScalarSelect[str]:
    """Select any distribution of a parameter, of which those of a study are all compatible."""
    return (
        sqlalchemy.select(models.TrialParamModel.distribution_json)
        .join(models.TrialModel)
        .where(models.TrialModel.study_id == study_id)
        .where(models.TrialParamModel.param_name == name)
        .limit(1)
        .scalar_subquery()
    )


def _insert_all(
    session: Session, kind: type[models.BaseModel], rows: Iterable[dict[str, Any]]
) -> None:
    if found := list(rows):
        session.execute(sqlalchemy.insert(kind), found)
