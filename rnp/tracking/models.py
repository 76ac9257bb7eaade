"""Models and data sets in MLflow."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rnp.tracking.store import Store, short_error, warn


def log_dataset(store: Store, run_id: str, name: str, md5: str, source: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = DatasetInput(
        Dataset(name, md5, "local", source), [InputTag("mlflow.data.context", "training")]
    )
    store.client.log_inputs(run_id, [data])


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
    """Link the model in `path` to a run; the store keeps one copy of each file. `maker` is the run
    that made it.

    `shape` is that of an image. A network that PyTorch cannot export is left out, with a warning.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    from rnp.io.files import sha256

    labels = {"rnp.sha256": sha256(path), "rnp.backdoored": str(backdoored).lower()}
    same = store.client.search_logged_models(
        [store.experiment], f"tags.`rnp.sha256` = '{labels['rnp.sha256']}'"
    )
    model = next((each for each in same if each.status == LoggedModelStatus.READY), None)
    if model is None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                export(path, shape, Path(folder, name))
            except Exception as error:
                return warn(
                    f"{path} is not logged, for PyTorch cannot export it ({short_error(error)})"
                )
            model = store.client.create_logged_model(store.experiment, name, maker, labels)
            store.client.log_model_artifacts(model.model_id, str(Path(folder, name)))
        store.client.finalize_logged_model(model.model_id, "READY")
    store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    store.client.set_tag(run_id, f"rnp.model.{name}", model.model_id)


def export(path: Path, shape: tuple[int, ...], folder: Path) -> None:
    """Write the model as MLflow reads it: a traced graph for inference that needs none of our
    code.
    """
    import mlflow.pytorch
    import numpy as np
    import torch

    from rnp.io.models import load_model

    model = load_model(path)[0].cpu().set_layout("the export warns of other strides")
    example = np.zeros((2, *shape), np.float32)  # a batch of one would be frozen into the graph
    torch_version = torch.__version__.partition("+")[0]
    mlflow.pytorch.save_model(
        model,
        str(folder),
        input_example=example,
        pip_requirements=[f"torch=={torch_version}"],
        serialization_format="pt2",
    )
