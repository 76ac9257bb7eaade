"""Models and data sets in MLflow."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rnp.tracking.store import Store, short_error, warn

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel


def log_dataset(store: Store, run_id: str, name: str, md5: str, source: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    context = InputTag("mlflow.data.context", "training")
    dataset = DatasetInput(Dataset(name, md5, "local", source), [context])
    store.client.log_inputs(run_id, [dataset])


def log_model(
    store: Store,
    run_id: str,
    path: Path,
    name: str,
    shape: tuple[int, ...],
    *,
    backdoored: bool,
    maker: str,
) -> None:
    """Link the model in `path` to a run; the store keeps one copy of each file.

    `shape` is that of an image, `maker` the run that made the model. A network that PyTorch cannot
    export is left out, with a warning.
    """
    from mlflow.entities import LoggedModelOutput

    from rnp.io.files import sha256

    labels = {"rnp.sha256": sha256(path), "rnp.backdoored": str(backdoored).lower()}
    model = find_model(store, labels["rnp.sha256"])
    if model is None:
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder, name)
            try:
                export(path, shape, exported)
            except Exception as error:
                reason = f"PyTorch cannot export it ({short_error(error)})"
                return warn(f"{path} is not logged, for {reason}")
            model = store.client.create_logged_model(store.experiment, name, maker, labels)
            store.client.log_model_artifacts(model.model_id, str(exported))
        store.client.finalize_logged_model(model.model_id, "READY")
    store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    store.client.set_tag(run_id, f"rnp.model.{name}", model.model_id)


def find_model(store: Store, digest: str) -> LoggedModel | None:
    """The model in the store that was made from the file with this SHA-256."""
    from mlflow.entities import LoggedModelStatus

    condition = f"tags.`rnp.sha256` = '{digest}'"
    models = store.client.search_logged_models([store.experiment], condition)
    return next((model for model in models if model.status == LoggedModelStatus.READY), None)


def export(path: Path, shape: tuple[int, ...], folder: Path) -> None:
    """Write the model for MLflow: a traced graph for inference, which needs no code of ours."""
    import numpy as np
    import torch
    from mlflow.pytorch import save_model

    from rnp.io.models import load_model

    model = load_model(path)[0].cpu().set_layout("the export warns of other strides")
    example = np.zeros((2, *shape), np.float32)  # a batch of one would be frozen into the graph
    torch_version = torch.__version__.partition("+")[0]
    save_model(
        model,
        str(folder),
        input_example=example,
        pip_requirements=[f"torch=={torch_version}"],
        serialization_format="pt2",
    )
