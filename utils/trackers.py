"""Optional copies of a run's scalars and configuration in Weights & Biases or MLflow: `--logger
wandb | mlflow`.

Neither is a requirement: each is imported when it is asked for. A resumed run goes on under the
same identifier, kept in tracker.json of the run folder. The services' own environment variables
hold: WANDB_MODE=offline, WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ... Without
them the project, or experiment, is the name of the data set, and MLflow writes to the database
<runs_dir>/mlflow.db. Pictures stay in TensorBoard.
"""

import importlib
import importlib.util
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config import ConfigError

LOGGERS = ("", "wandb", "mlflow")
OFFLINE = {
    "wandb": "WANDB_MODE=offline records without network or account",
    "mlflow": "without MLFLOW_TRACKING_URI it writes to a file, runs/mlflow.db",
}


def require_logger(name: str) -> None:
    """ConfigError if the package that `--logger` names is not installed; '' needs none."""
    if name and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"logger: {name} is not installed here; install it with 'python -m pip install "
            f"{name}', or go without "
            f"--logger (log.jsonl and TensorBoard are always written)"
        )


class Tracker:
    """One run at a service. What fails there is reported once and does not stop the training."""

    name = ""

    def __init__(self, folder: Path, config: Mapping[str, Any], identifier: str | None) -> None:
        """identifier: of the run to go on with; None starts one. Sets `identifier`."""
        self.working = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers by their tags kind/name; what is not finite is left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._guarded(self._send, step, finite)

    def close(self) -> None:
        self._guarded(self._finish)

    def _guarded(self, action, *arguments) -> None:
        if not self.working:
            return
        try:
            action(*arguments)
        except Exception as error:  # a service may fail in any way, and the training is worth more
            self.working = False
            print(
                f"warning: {self.name} stopped recording ({_one_line(error)}); the training goes "
                "on",
                file=sys.stderr,
            )


class WandbTracker(Tracker):
    """Weights & Biases."""

    name = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any], identifier: str | None) -> None:
        super().__init__(folder, config, identifier)
        self.identifier = identifier or secrets.token_hex(4)
        self.run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT") or config["dataset"],
            name=run_name(folder, config),
            id=self.identifier,
            resume="allow" if identifier else None,
            dir=str(folder),
            config=dict(config),
        )
        # With a step of our own, a resumed run may repeat the steps after its last checkpoint.
        self.run.define_metric("*", step_metric="step")

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def _finish(self) -> None:
        self.run.finish()


class MlflowTracker(Tracker):
    """MLflow."""

    name = "mlflow"

    def __init__(self, folder: Path, config: Mapping[str, Any], identifier: str | None) -> None:
        super().__init__(folder, config, identifier)
        self.mlflow = importlib.import_module("mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            # A database: MLflow no longer takes a folder of files by default.
            self.mlflow.set_tracking_uri(
                f"sqlite:///{(Path(config['runs_dir']) / 'mlflow.db').resolve()}"
            )
        if not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            self.mlflow.set_experiment(config["dataset"])
        run = self.mlflow.start_run(
            run_id=identifier, run_name=None if identifier else run_name(folder, config)
        )
        self.identifier = run.info.run_id
        if not identifier:  # parameters cannot be changed later
            self.mlflow.log_params({key: str(value) for key, value in config.items()})

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        # Its names may hold letters, digits and _-. /: a class such as 'kidney (left)' does not
        # fit.
        self.mlflow.log_metrics(
            {re.sub(r"[^\w\-. /]", "_", name): v for name, v in values.items()}, step=step
        )

    def _finish(self) -> None:
        self.mlflow.end_run()


TRACKERS = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def open_tracker(
    name: str, folder: Path, config: Mapping[str, Any], resumed: bool
) -> Tracker | None:
    """The tracker of this name ('': none), with the run folder's identifier if the run is
    `resumed`.
    """
    if not name:
        return None
    require_logger(name)
    path = folder / "tracker.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    try:
        tracker = TRACKERS[name](folder, config, known.get(name) if resumed else None)
    # whatever the service reports: no account, no network, a run of another server
    except Exception as error:
        raise ConfigError(
            f"logger: {name} does not start ({_one_line(error)}); {OFFLINE[name]}"
        ) from error
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(known | {name: tracker.identifier}), encoding="utf-8")
    os.replace(temporary, path)
    return tracker


def run_name(folder: Path, config: Mapping[str, Any]) -> str:
    """The run's path under runs_dir: acdc/crkd/unet2d-3/seed0."""
    return folder.resolve().relative_to(Path(config["runs_dir"]).resolve()).as_posix()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
