"""The model of a run as MLflow's LoggedModel: its files, its scores and the data they are of on one
page.
"""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric

KIND = "text-to-image"
OWN_METRICS = ("train/loss", "validation/loss")


def logged_model(
    client: MlflowClient, run_id: str, name: str, step: int | None = None
) -> LoggedModel | None:
    """The run's model of this name and step, the newest without a step; None where the run has
    none.
    """
    outputs = client.get_run(run_id).outputs
    found = []
    for output in outputs.model_outputs if outputs else []:
        model = client.get_logged_model(output.model_id)
        if model.name == name and step in (None, output.step):
            found.append((output.step, model))
    return max(found, key=lambda entry: entry[0])[1] if found else None


def create_logged_model(client: MlflowClient, run_id: str, name: str, step: int) -> LoggedModel:
    """The run's model of this name and step: the one that an interrupted call left,
    else a new one.
    """
    if known := logged_model(client, run_id, name, step):
        return known
    run = client.get_run(run_id)
    made = client.create_logged_model(
        run.info.experiment_id, name, run_id, params=dict(run.data.params), model_type=KIND
    )
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step)])
    return made


def finish_logged_model(client: MlflowClient, run_id: str, model: LoggedModel) -> None:
    """All files have arrived: the run's last losses become the model's, on the run's first data
    set.
    """
    run = client.get_run(run_id)
    inputs = run.inputs.dataset_inputs if run.inputs else []
    data = (
        {"dataset_name": inputs[0].dataset.name, "dataset_digest": inputs[0].dataset.digest}
        if inputs
        else {}
    )
    last = []
    for name in OWN_METRICS:
        if history := client.get_metric_history(run_id, name):
            point = max(history, key=lambda each: each.step)
            last.append(
                Metric(name, point.value, point.timestamp, point.step, model.model_id, **data)
            )
    if last:
        client.log_batch(run_id, metrics=last)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
