r"""Export a trained network for deployment, check the result against PyTorch, and describe it in a
model card.

    python tools/export.py --ckpt runs/btcv/acf_bckd/resunet-unet/seed0/best.pt --format onnx
    # quantised; measures its Dice
    python tools/export.py --ckpt best.pt --format openvino --int8 --out deploy
    # checked on a scan of one's own
    python tools/export.py --ckpt best.pt --format torchscript --input scan.nii.gz
    python tools/export.py --ckpt best.pt --format monai_bundle --licence "CC-BY-SA 4.0"
    # a student of nnU-Net's architecture, for nnUNetv2_predict
    python tools/export.py --ckpt best.pt --format nnunet --out nnUNet_students

Formats: onnx (ONNX Runtime), openvino, torchscript (deprecated by PyTorch, for programs that ask
for it), torch_export, monai_bundle, nnunet (a results folder: tools/nnunet_export.py). The student
alone is exported, or the network that few labels trained; the batch size stays free, the window is
the run's patch_size. The check compares both on windows of real size and on the whole
sliding-window prediction of a case: of the run's test, validation or training list where its files
are there, of --input, or of a generated scan. A model that fails it is not left behind. Beside the
model goes `<model>.json`, which prediction needs:
`python predict_3d.py --model deploy/model.onnx ...`. Beside onnx and openvino models of 3D networks
goes `run_model.py` too, which segments NIfTI scans without this repository and without PyTorch
(tools/standalone); it runs the model that was exported last to its folder.

--int8 quantises weights and activations (ONNX Runtime, static, calibrated on windows of the
training list) and compares Dice of both models on the test or validation list. Packages for all
this: pip install -r requirements-export.txt
"""

import argparse
import contextlib
import datetime
import json
import logging
import math
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataloaders import DataError
from inference import to_labels
from tools import deployed, model_card, monai_bundle, nnunet_export, standalone
from tools.deployed import Sample
from utils.checkpoint import digest, write_text
from utils.config import ConfigError, add_plugin_flags
from utils.exported import (
    FORMATS,
    ExportedModel,
    file_digest,
    model_files,
    openvino_core,
    optional,
    sidecar,
)
from utils.scripts import run_tool

# version of ONNX: the oldest that the exporter writes without converting, so the one that most
# runtimes read
OPSET = 18
PACKAGES = ("torch", "monai", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino")


class ExportError(ValueError):
    """An exported model that does not do what its network does; the message has the figures."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, type=Path, help="best.pt or last.pt of a run")
    parser.add_argument("--format", required=True, choices=(*FORMATS, *MAKERS))
    parser.add_argument(
        "--out", type=Path, help="folder for the model; default: export/ beside the checkpoint"
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="scan to check the model on, one file or one per channel",
    )
    parser.add_argument(
        "--data-root", type=Path, help="folder of the data set, if it is not where the run found it"
    )
    parser.add_argument("--cache-dir", type=Path, help="folder of preprocessed cases")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest difference, as a share of the largest value or, if that is below 1, of 1",
    )
    parser.add_argument(
        "--min-agreement", type=float, default=0.999, help="smallest share of voxels labelled alike"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's number")
    parser.add_argument("--int8", action="store_true", help="quantise (onnx, openvino)")
    parser.add_argument(
        "--calibration", type=int, default=32, metavar="N", help="windows that calibrate int8"
    )
    parser.add_argument(
        "--cases", type=int, default=0, metavar="N", help="cases for the Dice of int8; 0: all"
    )
    parser.add_argument(
        "--max-dice-cost", type=float, default=0.02, help="largest fall of the mean Dice by int8"
    )
    parser.add_argument(
        "--plans",
        type=Path,
        metavar="FOLDER",
        help="nnunet: results folder whose plans to write; default: that of the run's teacher",
    )
    parser.add_argument("--licence", default="", help="licence of the weights, for the model card")
    parser.add_argument("--intended-use", default="", help="intended use, for the model card")
    add_plugin_flags(parser)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.int8 and args.format not in ("onnx", "openvino"):
        parser.error(f"--int8 is for --format onnx and openvino, not {args.format}")
    if args.plans and args.format != "nnunet":
        parser.error(f"--plans is for --format nnunet, not {args.format}")
    if (
        not 0 < args.tolerance
        or not 0 <= args.min_agreement <= 1
        or args.threads < 0
        or args.cases < 0
    ):
        parser.error(
            "out of range: tolerance > 0, min-agreement in 0..1, threads and cases 0 or more"
        )
    if args.calibration < 1:
        parser.error(f"--calibration: at least one window, got {args.calibration}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    checkpoint, network = deployed.load_network(args.ckpt, args.plugin, args.allow_changed_plugin)
    args.out = args.out or args.ckpt.with_name(
        "export" if args.ckpt.stem == "best" else f"export_{args.ckpt.stem}"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=args.out, prefix=".exporting-") as temporary:
            folder = Path(temporary)
            source, files, sample = verification_case(args, checkpoint, folder)
            make = MAKERS.get(args.format, make_model)
            made = make(args, checkpoint, network, source, files, sample, folder)
            for path in made:  # all is well: into place
                target = args.out / path.relative_to(folder)
                if target.is_dir():
                    shutil.rmtree(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    except BaseException:
        with contextlib.suppress(OSError):  # there is something in it
            args.out.rmdir()
        raise
    names = ", ".join(path.relative_to(folder).as_posix() for path in made)
    print(f"results in {args.out}: {names}")
    return 0


def make_model(
    args: argparse.Namespace,
    checkpoint: dict,
    network: nn.Module,
    source: str,
    files: Sequence[Path],
    sample: Sample,
    folder: Path,
) -> list[Path]:
    """Write a model, check and describe it -> the files to keep; ExportError if it is not good."""
    described = deployed.description(checkpoint)
    path = folder / f"model{'_int8' if args.int8 else ''}{FORMATS[args.format]}"
    dataset = deployed.open_dataset(described, args.data_root, args.cache_dir or folder / "cache")
    if args.int8:
        write_quantised(args, checkpoint, network, dataset, path)
    else:
        write(network, args.format, path, window(described, 2))
    described["exported"] = exported(args, path) | {"weights": digest(checkpoint["weights"])}
    scripts = []
    told = standalone.steps(described, dataset)
    if args.format in ("onnx", "openvino") and told:
        described["standalone"] = told
        scripts.append(folder / standalone.NAME)
        write_text(scripts[0], standalone.script(told, path.name))
    write_text(sidecar(path), json.dumps(deployed.without_folders(described)))
    model = ExportedModel(path, args.threads, trusted=True)  # just written
    pair = (network, model, sample, described, dataset.multilabel)
    checks = {"windows": compare_windows(*pair), "case": {"source": source, **compare_case(*pair)}}
    if args.int8:
        checks["dice"] = compare_dice(args, checkpoint, network, model, dataset)
    show(path.name, checks)
    enforce(args, path.name, checks)
    described["exported"] |= {"checks": checks}
    write_text(sidecar(path), json.dumps(deployed.without_folders(described), indent=1))
    card = folder / "model_card.md"
    content = model_card.text(
        args, checkpoint, network, dataset.multilabel, path, described["exported"]
    )
    write_text(card, content)
    return [*model_files(path), sidecar(path), card, *scripts]


def make_bundle(
    args: argparse.Namespace,
    checkpoint: dict,
    network: nn.Module,
    source: str,
    files: Sequence[Path],
    sample: Sample,
    folder: Path,
) -> list[Path]:
    """Write a MONAI bundle around a TorchScript model, check the model and what the bundle
    segments.
    """
    described = deployed.description(checkpoint)
    dataset = deployed.open_dataset(described, args.data_root, args.cache_dir or folder / "cache")
    target = folder / "bundle"
    monai_bundle.check_supported(described)
    for part in ("configs", "docs", "models"):
        (target / part).mkdir(parents=True)
    inner = argparse.Namespace(**vars(args) | {"format": "torchscript", "out": target / "models"})
    model, _, card = make_model(inner, checkpoint, network, source, files, sample, inner.out)
    os.replace(card, target / "docs" / "README.md")
    monai_bundle.write(target, described, dataset, network, args)
    monai_bundle.verify_metadata(target)
    expected = deployed.predict(
        ExportedModel(model, args.threads, trusted=True),
        sample.image,
        described,
        dataset.multilabel,
    )
    agreement = monai_bundle.agreement(target, described, dataset, files, sample, expected, folder)
    print(
        f"bundle, run by MONAI on {source}: {100 * agreement:.4f} % of the file's voxels labelled "
        "as PyTorch does"
    )
    if agreement < args.min_agreement:
        raise ExportError(
            f"the bundle's own preprocessing and sliding window label only {agreement:.6f} of the "
            "voxels as the "
            f"network's do, expected {args.min_agreement}; the bundle was removed"
        )
    return [target]


def make_nnunet(
    args: argparse.Namespace,
    checkpoint: dict,
    network: nn.Module,
    source: str,
    files: Sequence[Path],
    sample: Sample,
    folder: Path,
) -> list[Path]:
    """Write a results folder of nnU-Net, and compare the network that is read from it."""
    made = nnunet_export.write(folder, checkpoint, network, args.plans)
    target = args.out / made.relative_to(folder)
    if target.exists():  # perhaps the teacher
        raise ConfigError(f"{target}: is there already; remove it, or name another --out")
    described, path = deployed.description(checkpoint), nnunet_export.weights_file(made)
    multilabel = bool(described["dataset"].get("regions"))
    pair = (network, nnunet_export.read_back(made), sample, described, multilabel)
    checks = {"windows": compare_windows(*pair), "case": {"source": source, **compare_case(*pair)}}
    show(path.name, checks)
    enforce(args, path.name, checks)
    about = exported(args, path) | {"checks": checks}
    card = model_card.text(args, checkpoint, network, multilabel, path, about)
    write_text(made / "model_card.md", card)
    return [made]


MAKERS = {"monai_bundle": make_bundle, "nnunet": make_nnunet}


def verification_case(
    args: argparse.Namespace, checkpoint: dict, folder: Path
) -> tuple[str, list[Path], Sample]:
    """Where the case to check on comes from, in words; its image files; the case."""
    described = deployed.description(checkpoint)
    kind = described["kind"]
    if not args.input:
        try:
            dataset = deployed.open_dataset(described, args.data_root, args.cache_dir)
            split, cases = deployed.listed(checkpoint, dataset, ("test", "val"))
            sample = deployed.read(dataset, kind, cases[0])
        except DataError as problem:
            if args.data_root:  # asked for
                raise
            print(
                f"note: the run's data are not here ({str(problem).splitlines()[0][:200]}); "
                "checking on a generated "
                f"scan, which --input FILE or --data-root FOLDER would replace by a real one",
                file=sys.stderr,
            )
        else:
            files = deployed.image_files(kind, cases[0], sample, folder)
            # the case's name is nobody's business
            return f"the first case of the {split} list", files, sample
    files = args.input or deployed.phantom_files(described, folder)
    sample = deployed.read_files(described, files)
    return "the scan of --input" if args.input else "a generated scan", list(files), sample


def window(described: dict[str, Any], batch: int) -> Tensor:
    """An empty input of the size that the network is exported for."""
    return torch.zeros(
        batch, described["network"]["in_channels"], *described["config"]["patch_size"]
    )


def write(network: nn.Module, form: str, path: Path, example: Tensor) -> None:
    """Write the network in one of FORMATS; `example` is an input of a batch of two."""
    if form == "onnx":
        write_onnx(network, path, example)
    elif form == "openvino":
        onnx = path.with_name("float.onnx")
        write_onnx(network, onnx, example)
        write_openvino(onnx, path)
    elif form == "torchscript":
        with warnings.catch_warnings(), torch.inference_mode():
            # deprecated; and sizes become constants, which is meant: windows are fixed
            warnings.simplefilter("ignore")
            torch.jit.trace(network, example, check_trace=False).save(path)
    else:
        torch.export.save(graph_of(network, example), path)


def graph_of(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The network as torch.export has it, with a free batch size."""
    return torch.export.export(
        network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )


def write_onnx(network: nn.Module, path: Path, example: Tensor) -> None:
    """Write an ONNX model with the input `image` and the output `logits`."""
    for name in ("onnx", "onnxscript"):
        optional(name, "export to ONNX and OpenVINO")
    graph = graph_of(network, example)
    pooling = torch.ops.aten.adaptive_avg_pool3d.default  # ESPNetV2's pyramids; ONNX has none
    if any(node.target is pooling for node in graph.graph.nodes):
        graph = graph.run_decompositions({pooling: average_pool})
    with quiet():
        torch.onnx.export(
            graph,
            (),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    onnx = optional("onnx", "export to ONNX and OpenVINO")
    model = onnx.load_model(path)
    for part in (model.graph, *model.functions):
        for node in part.node:  # which lines of which files on this machine it comes from
            del node.metadata_props[:]
    onnx.save_model(model, path)


def average_pool(image: Tensor, output_size: Sequence[int]) -> Tensor:
    """`adaptive_avg_pool3d` as a matrix product for each axis: (B, C, H, W, D) -> (B, C,
    *output_size).
    """
    for axis, count in zip((-3, -2, -1), output_size):
        side = image.shape[axis]
        index = torch.arange(count, device=image.device)
        begin, end = index * side // count, -((-(index + 1) * side) // count)
        place = torch.arange(side, device=image.device)[:, None]
        share = ((place >= begin) & (place < end)).to(image.dtype) / (end - begin)  # (side, count)
        image = (image.movedim(axis, -1) @ share).movedim(-1, axis)
    return image


def write_openvino(onnx: Path, path: Path) -> None:
    """Write an ONNX model as OpenVINO's XML and its weights, in full precision."""
    runtime = optional("openvino", "export to OpenVINO")
    # Not convert_model, which reports its use over the network.
    model = openvino_core("export to OpenVINO").read_model(onnx)
    runtime.save_model(model, path, compress_to_fp16=False)


def write_quantised(
    args: argparse.Namespace, checkpoint: dict, network: nn.Module, dataset, path: Path
) -> None:
    """Write an int8 model: weights by channel, activations by the range that calibration windows
    give.
    """
    described = deployed.description(checkpoint)
    # Slices of a volume are read together, so the 2D data sets' evaluation lists serve.
    lists = ("val", "test") if described["kind"] == "2d-semi" else ("train", "labelled")
    _, cases = deployed.listed(checkpoint, dataset, lists)
    cases = cases[: args.calibration]
    each = math.ceil(args.calibration / len(cases))
    windows = torch.cat(
        [
            deployed.real_windows(
                deployed.read(dataset, described["kind"], case), described, each, seed=k
            )
            for k, case in enumerate(
                tqdm(cases, desc="reading windows for calibration", unit="case")
            )
        ]
    )[: args.calibration]
    onnx = path.with_name("float.onnx")
    write_onnx(network, onnx, window(described, 2))
    quantised = path.with_name("model_int8.onnx")
    quantise(onnx, quantised, windows)
    if path.suffix == FORMATS["openvino"]:
        write_openvino(quantised, path)


def quantise(onnx: Path, path: Path, windows: Tensor) -> None:
    """Static quantisation by ONNX Runtime: each window (C, *patch_size) of `windows` is passed
    through once.
    """
    tools = optional("onnxruntime.quantization", "--int8")
    shape_inference = optional("onnxruntime.quantization.shape_inference", "--int8")

    class Windows(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(tqdm(windows.split(1), desc="calibrating", unit="window"))

        def get_next(self) -> dict | None:
            item = next(self.left, None)
            return None if item is None else {"image": item.numpy()}

    folded = onnx.with_name("folded.onnx")
    with quiet():
        # Folds batch norms into convolutions, which quantisation wants. The symbolic shapes need
        # packages more.
        shape_inference.quant_pre_process(str(onnx), str(folded), skip_symbolic_shape=True)
        tools.quantize_static(
            str(folded),
            str(path),
            Windows(),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps exporters from narrating: their warnings concern what the checks below look at
    anyway.
    """
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def difference(expected: Tensor, found: Tensor, multilabel: bool) -> dict[str, float]:
    """Largest absolute difference of logits (..., K, *spatial) by batch items, and the share of
    labels that agree.
    """
    agree = [
        (to_labels(a, multilabel) == to_labels(b, multilabel)).float().mean()
        for a, b in zip(expected, found)
    ]
    return {
        "max_abs_difference": (expected - found).abs().max().item(),
        "largest": expected.abs().max().item(),
        "label_agreement": torch.stack(agree).double().mean().item(),
    }


def compare_windows(
    network: nn.Module, model: nn.Module, sample: Sample, described: dict, multilabel: bool
) -> dict:
    """Both on windows of real size, in batches of one and of three."""
    windows = deployed.real_windows(sample, described, 4)
    with torch.inference_mode():
        pairs = [(network(part), model(part)) for part in (windows[:1], windows[1:])]
    if any(a.shape != b.shape for a, b in pairs):
        expected, found = ([tuple(logits.shape) for logits in side] for side in zip(*pairs))
        raise ExportError(
            f"the exported model gives logits of shape {found}, the network {expected}"
        )
    return difference(*(torch.cat(part) for part in zip(*pairs)), multilabel)


def compare_case(
    network: nn.Module, model: nn.Module, sample: Sample, described: dict, multilabel: bool
) -> dict:
    """Both on the sliding-window prediction of a whole case (of 2D networks, on all of its
    slices).
    """
    expected, found = (
        deployed.predict_scores(one, sample.image, described) for one in (network, model)
    )
    if described["kind"] != "2d-semi":
        expected, found = expected[None], found[None]
    return difference(expected, found, multilabel)


def compare_dice(
    args: argparse.Namespace, checkpoint: dict, network: nn.Module, model: nn.Module, dataset
) -> dict:
    """Mean Dice of both over the test list, or the validation list where there is no other."""
    split, cases = deployed.listed(checkpoint, dataset, ("test", "val"))
    cases = cases[: args.cases or None]
    described = deployed.description(checkpoint)
    exact, quantised = (
        deployed.mean_dice_of(
            one, dataset, described, tqdm(cases, desc=f"Dice of {name}", unit="case")
        )
        for name, one in (("float", network), ("int8", model))
    )
    return {
        "split": split,
        "cases": len(cases),
        "float": exact,
        "int8": quantised,
        "cost": exact - quantised,
    }


def show(name: str, checks: dict) -> None:
    """Print what the checks found."""
    for key, place in (
        ("windows", "windows of real size, batches of 1 and 3"),
        ("case", checks["case"]["source"]),
    ):
        found = checks[key]
        print(
            f"{name}, {place}: largest difference {found['max_abs_difference']:.2e} (largest value "
            f"{found['largest']:.3g}), {100 * found['label_agreement']:.4f} % of labels agree"
        )
    if "dice" in checks:
        found = checks["dice"]
        print(
            f"{name}, {found['cases']} {found['split']} cases: mean Dice "
            f"{100 * found['float']:.2f} in float, "
            f"{100 * found['int8']:.2f} in int8, which costs {100 * found['cost']:.2f} points"
        )


def enforce(args: argparse.Namespace, name: str, checks: dict) -> None:
    """ExportError if a check is beyond its bound."""
    gone = "the model was removed"
    if "dice" in checks:
        if not checks["dice"]["cost"] <= args.max_dice_cost:
            raise ExportError(
                f"{name}: int8 costs {checks['dice']['cost']:.4f} of mean Dice, more than "
                "--max-dice-cost "
                f"{args.max_dice_cost}; {gone}. Calibrate with more windows (--calibration), or "
                "export without --int8"
            )
        return
    for key in ("windows", "case"):
        found = checks[key]
        allowed = args.tolerance * max(1.0, found["largest"])
        if (
            not found["max_abs_difference"] <= allowed
            or not found["label_agreement"] >= args.min_agreement
        ):
            raise ExportError(
                f"{name}: differs from PyTorch by {found['max_abs_difference']:.3g} on {key}, "
                f"allowed {allowed:.3g} "
                f"(--tolerance {args.tolerance}), with {found['label_agreement']:.6f} of the "
                "labels alike, expected "
                f"{args.min_agreement} (--min-agreement); {gone}"
            )


def exported(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What a description says of the model file itself."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "format": args.format,
        "precision": "int8" if args.int8 else "float32",
        "files": {file.name: file_digest(file) for file in model_files(path)},
        "bytes": sum(file.stat().st_size for file in model_files(path)),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "tools/export.py", *deployed.without_folders(args.argv)]),
    }


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError, ExportError))
