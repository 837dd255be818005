"""Made-up runs in MLflow's database, written as rows: its own interface takes minutes for them."""

import hashlib
import os
from pathlib import Path
from unittest.mock import patch

TAGS = 8  # beside those that taskvec looks for
ALIAS = "champion"
EDIT = "edit_0"


def fill(root: Path, uri: str, number: int, model: str) -> None:
    """Create MLflow's tables, record runs of stages and promote a model.

    Args:
        root: of the repository.
        uri: of an empty database.
        number: how many runs.
        model: md5 of the model that becomes a registered one.
    """
    from sqlalchemy import create_engine, text

    from flows.registry import DIGEST
    from flows.store import KEY
    from flows.tracking import Connection

    with patch.dict(os.environ, {"MLFLOW_TRACKING_URI": uri}):
        connection = Connection(root)
        client = connection.client
        client.create_registered_model(EDIT)
        version = client.create_model_version(EDIT, "file:///nowhere")
        client.set_model_version_tag(EDIT, version.version, DIGEST, model)
        client.set_registered_model_alias(EDIT, ALIAS, version.version)
    runs, tags = [], []
    for i in range(number):
        run = hashlib.md5(f"run {i}".encode(), usedforsecurity=False).hexdigest()
        runs.append({"run": run, "name": f"stage {i}", "experiment": connection.experiment})
        values = {KEY: f"log/{i}", "dvc.stage": f"stage {i}", "dvc.outs": run, "dvc.deps": run}
        values |= {f"tag.{j}": f"value {i}" for j in range(TAGS)}
        tags += [{"run": run, "key": key, "value": value} for key, value in values.items()]
    engine = create_engine(uri)
    with engine.begin() as database:
        database.execute(
            text(
                "INSERT INTO runs (run_uuid, name, source_type, status, start_time, end_time, "
                "lifecycle_stage, artifact_uri, experiment_id) VALUES (:run, :name, 'LOCAL', "
                "'FINISHED', 1, 2, 'active', 'file:///nowhere', :experiment)"
            ),
            runs,
        )
        database.execute(
            text("INSERT INTO tags (key, value, run_uuid) VALUES (:key, :value, :run)"), tags
        )
    engine.dispose()
