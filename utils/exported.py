"""Run exported networks: files of tools/export.py in the place of the network that they were made
from.

Beside each model lies `<model>.json`: the checkpoint's description (network, class names,
configuration, arguments of the data set) and, under `exported`, what this file is. Runtimes are
imported when a model asks for them; PyTorch alone runs TorchScript and torch.export files.

ONNX and OpenVINO files are graphs of known operations, which are read and not run. Those of
TorchScript and torch.export are programs: to load one is to run what its author wrote, so the user
has to say that he trusts it.
"""

import functools
import hashlib
import importlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.checkpoint import CheckpointError, check_plain_texts, describing
from utils.config import ConfigError

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".ts", "torch_export": ".pt2"}
REQUIREMENTS = "requirements-export.txt"
PROGRAMS = (".ts", ".pt2")  # files that can do anything that Python can, once they are loaded
NEEDED = ("kind", "network", "class_names", "config", "dataset", "exported")
TRUST_HELP = "load this .ts or .pt2 file although such a file can run code: you know who made it"


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


def require_trust(path: Path, trusted: bool) -> None:
    """CheckpointError for a file that is a program, unless the user has said that he trusts it."""
    if path.suffix in PROGRAMS and not trusted:
        raise CheckpointError(
            f"{path}: not loaded, because a {path.suffix} file is a program: it can run any code "
            "and overwrite any file of yours. If you made it, or trust who did, add --trust-model; "
            ".onnx and .xml files do not need that"
        )


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
        check_plain_texts(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{described}: not valid JSON ({error}); {again}") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{described}: expected an object, got {type(content).__name__}; {again}"
        )
    missing = [key for key in NEEDED if key not in content]
    if isinstance(content.get("dataset"), dict):
        content["dataset"].pop("allow_outside", None)  # the user's to say, never a file's
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
    files follow in any case. trusted: the file may run code, as .ts and .pt2 can. It stands in for
    the network wherever windows are predicted; `description` has the keys of the checkpoint.
    """

    def __init__(self, path: str | Path, threads: int = 0, *, trusted: bool = False) -> None:
        super().__init__()
        self.path = Path(path)
        self.description = read_description(self.path)
        require_trust(self.path, trusted)
        with describing(sidecar(self.path)):
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
    refuse_external_data(path)
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
    # OpenVINO goes by the content: an ONNX file of this name would be read with what it refers to.
    with path.open("rb") as file:
        begin = file.read(1024)
    if not re.match(rb"\s*(<\?xml[^>]*>\s*)?<net\b", begin):
        raise CheckpointError(f"{path}: not an OpenVINO model; expected XML that begins with <net>")
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


def refuse_external_data(path: Path) -> None:
    """CheckpointError for an ONNX model that takes weights from other files: which ones is for the
    model to say, and its digest covers none of them. tools/export.py keeps all in the model.
    """
    onnx = optional("onnx", f"checking {path.name}")
    model = _loaded(path, lambda: onnx.load_model(path, load_external_data=False))
    for tensor in _tensors(model):
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
            named = {entry.key: entry.value for entry in tensor.external_data}
            raise CheckpointError(
                f"{path}: takes the weights '{tensor.name}' from another file, "
                f"{named.get('location')!r}, which is not read; export it again with "
                "tools/export.py, which keeps all weights in the model"
            )


def _tensors(message: Any) -> Iterator[Any]:
    """All TensorProto in a message of ONNX, however deep: of subgraphs and functions too."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if isinstance(value, Sequence) else [value]:
            yield from _tensors(part)


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
