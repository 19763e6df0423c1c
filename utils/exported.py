"""Run exported networks: files of tools/export.py in the place of the network that they were made
from.

Beside each model lies `<model>.json`: the checkpoint's description (network, class names,
configuration, arguments of the data set) and, under `exported`, what this file is. Runtimes are
imported when a model asks for them; PyTorch alone runs TorchScript and torch.export files.
"""

import functools
import hashlib
import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.checkpoint import CheckpointError
from utils.config import ConfigError

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".ts", "torch_export": ".pt2"}
REQUIREMENTS = "requirements-export.txt"
NEEDED = ("kind", "network", "class_names", "config", "dataset", "exported")


def optional(name: str, purpose: str) -> ModuleType:
    """The module `name`; ConfigError that says what needs it and how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs the package {name.partition('.')[0]} ({error}); "
            f"install it with: pip install -r {REQUIREMENTS}"
        ) from error


def openvino_core(purpose: str) -> Any:
    """OpenVINO's Core, the same for all of the process; ConfigError that says what needs it if it
    is not installed.

    Each Core that runs models on the CPU gives its thread a stack for signals and puts back the one
    before when it goes. If two of them go in another order than the reverse, the thread keeps a
    stack that is freed, and its next signal (the end of a loader process is enough) kills the
    process. So there is one, and it stays.
    """
    return _core(optional("openvino", purpose))


@functools.cache
def _core(openvino: ModuleType) -> Any:
    return openvino.Core()


def sidecar(path: Path) -> Path:
    """Where the description of a model lies."""
    return path.with_name(f"{path.name}.json")


def model_files(path: Path) -> list[Path]:
    """The model and, for OpenVINO, its weights."""
    return [path, path.with_suffix(".bin")] if path.suffix == FORMATS["openvino"] else [path]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_description(path: str | Path) -> dict[str, Any]:
    """The description of an exported model, once model and description are known to be whole and to
    belong together.
    """
    path = Path(path)
    if path.suffix not in FORMATS.values():
        raise CheckpointError(
            f"{path}: not an exported model; expected a file that ends in "
            f"{', '.join(FORMATS.values())} "
            f"(tools/export.py makes them of checkpoints)"
        )
    for file in model_files(path):
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such model file; copy it from where it was exported, or export again"
            )
    described = sidecar(path)
    again = "copy it from where the model was exported, or export again with tools/export.py"
    if not described.is_file():
        raise CheckpointError(
            f"{described}: no such file; prediction needs this description of {path.name}: {again}"
        )
    try:
        content = json.loads(described.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{described}: not valid JSON ({error}); {again}") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{described}: expected an object, got {type(content).__name__}; {again}"
        )
    missing = [key for key in NEEDED if key not in content]
    exported = content.get("exported")
    if not missing and not (isinstance(exported, dict) and isinstance(exported.get("files"), dict)):
        missing = ["exported.files"]
    if missing:
        raise CheckpointError(f"{described}: lacks {', '.join(missing)}; {again}")
    for file in model_files(path):
        found, expected = file_digest(file), content["exported"]["files"].get(file.name)
        if found != expected:
            raise CheckpointError(
                f"{file}: damaged, or not the file that {described.name} describes (SHA-256 "
                f"{found[:12]}..., "
                f"expected {str(expected)[:12]}...); copy both again, or export again"
            )
    return content


class ExportedModel(nn.Module):
    """An exported network on the CPU: windows `(B, in_channels, *patch_size)` float32 -> logits
    `(B, K, *patch_size)`.

    path: .onnx, .xml (OpenVINO), .ts (TorchScript) or .pt2 (torch.export) with its description
    beside it. threads: of the runtime; 0 takes PyTorch's number, which TorchScript and torch.export
    files follow in any case. It stands in for the network wherever windows are predicted;
    `description` has the keys of the checkpoint.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        self.description = read_description(self.path)
        self.in_channels = int(self.description["network"]["in_channels"])
        self.num_classes = int(self.description["network"]["num_classes"])
        self.patch_size = tuple(self.description["config"]["patch_size"])
        # Sliding-window prediction asks a network's parameters where windows must go.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self._run = _LOADERS[self.path.suffix](self.path, threads or torch.get_num_threads())
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        expected = (self.in_channels, *self.patch_size)
        if tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"{self.path.name}: expected an input (B, {', '.join(map(str, expected))}), got "
                f"{tuple(image.shape)}; "
                f"predict with windows of this patch_size, or export the checkpoint for another"
            )
        return self._run(image.to("cpu", torch.float32).contiguous()).to(image.device)


def _onnx(path: Path, threads: int):
    runtime = optional("onnxruntime", f"running {path.name}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors: what it warns of concerns its own optimisation
    session = _loaded(
        path, lambda: runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    )
    name = session.get_inputs()[0].name
    return lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0])


def _openvino(path: Path, threads: int):
    core = openvino_core(f"running {path.name}")
    # Without the hint, processors with bfloat16 instructions would compute in bfloat16.
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = _loaded(path, lambda: core.compile_model(path, "CPU", options))
    return lambda image: torch.from_numpy(np.array(compiled(image.numpy())[0]))


def _torchscript(path: Path, threads: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        module = _loaded(path, lambda: torch.jit.load(path, map_location="cpu").eval())
    return lambda image: module(image)  # not a submodule: its weights are its own business


def _torch_export(path: Path, threads: int):
    module = _loaded(path, lambda: torch.export.load(path)).module()
    return lambda image: module(image)  # not a submodule: it refuses eval()


def _loaded(path: Path, load):
    """`load()`; CheckpointError for whatever a runtime finds wrong with the file."""
    try:
        return load()
    except Exception as error:  # each runtime has its own classes
        raise CheckpointError(
            f"{path}: its runtime cannot load it "
            f"({' '.join(str(error).split())[:200] or type(error).__name__}); "
            f"export it again with the versions of {REQUIREMENTS}"
        ) from error


_LOADERS = {".onnx": _onnx, ".xml": _openvino, ".ts": _torchscript, ".pt2": _torch_export}
