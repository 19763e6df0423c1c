"""What an nnU-Net v2 results folder says, read without nnU-Net and without running code.

    DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION/
        plans.json  dataset.json  fold_0/checkpoint_final.pth  fold_1/...

Both plans formats are read: with `architecture`, and the older one with `UNet_class_name`. Whatever
is not known to be the plain or the residual 3D U-Net with nnU-Net's own preprocessing is refused
with its name. The networks: networks/nnunet.py.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoint import CheckpointError, load_foreign
from utils.run import plain

_UNET = "dynamic_network_architectures.architectures"
ENCODERS = {
    f"{_UNET}.unet.PlainConvUNet": "plain",
    f"{_UNET}.unet.ResidualEncoderUNet": "residual",
    f"{_UNET}.residual_unet.ResidualEncoderUNet": "residual",
}
OLD_CLASSES = {"PlainConvUNet": "plain", "ResidualEncoderUNet": "residual"}
BLOCKS = {"plain": "n_conv_per_stage", "residual": "n_blocks_per_stage"}
IMPORTED = {"conv_op", "norm_op", "dropout_op", "nonlin"}  # keys that nnU-Net resolves by import
# Parts of trainers' names that change losses, schedules and augmentation, not the network
SAME_NETWORK = (
    *(r"\d+epochs?", "1500ep", "Benchmark", "noDataLoading", "warmup", "CosAnneal"),
    *("Adan", "Adam", "VanillaAdam", "1en1", "1en3", "3en4"),
    *("DA5Segord0", "DA5ord0", "DA5", "NoDA", "DASegOrd0", "noDummy2DDA"),
    *("NoMirroring", "onlyMirror01", "NoDeepSupervision"),
    *("DiceLoss", "DiceCELoss", "CELoss", "noSmooth", "DiceTopK10Loss", "Topk10Loss", "LS01"),
    *("probabilisticOversampling", "033", "010"),
)
TRAINER = re.compile(rf"nnUNetTrainer(_?({'|'.join(SAME_NETWORK)}))*")
READERS = {"SimpleITKIO": "", "NibabelIO": "", "NibabelIOWithReorient": "RAS"}
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
SCHEMES = (
    *("CTNormalization", "ZScoreNormalization", "NoNormalization"),
    *("RescaleTo01Normalization", "RGBTo01Normalization"),
)
CT_NUMBERS = ("percentile_00_5", "percentile_99_5", "mean", "std")
WEIGHTS = ("checkpoint_final.pth", "checkpoint_best.pth")
LARGEST_JSON = 64 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Results:
    """A results folder. Axes are those of our images (x, y, z as stored, or R, A, S where nnU-Net
    reorients), unless said otherwise.

    network: arguments of networks.nnunet.NnUNet. classes: name -> ids, in the order of the outputs.
    folds: name -> checkpoint.
    """

    folder: Path
    configuration: str
    in_channels: int
    classes: dict[str, tuple[int, ...]]
    regions: bool
    regions_class_order: tuple[int, ...]
    ignore: int | None
    network: dict[str, Any]
    orientation: str
    spacing: tuple[float, ...]  # mm
    patch_size: tuple[int, ...]
    intensity_channels: tuple[dict, ...]
    folds: dict[str, Path]
    dataset: str
    batch_size: int

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The keys of a configuration that make our images what the network was trained on."""
        return {
            "orientation": self.orientation,
            "spacing": self.spacing,
            "intensity": "nnunet",
            "intensity_channels": self.intensity_channels,
            "crop_foreground": True,
        }

    def outputs(self, names: Sequence[str], source: str) -> list[int]:
        """Which output each class of `names` is; CheckpointError where they are not the same."""
        own = list(self.classes)
        if sorted(own) != sorted(names):
            raise CheckpointError(
                f"{source}: this nnU-Net does not fit: its classes are {', '.join(own)}, those of "
                f"the configuration {', '.join(names)}"
            )
        return [own.index(name) for name in names]

    def unlike(self, given: Mapping[str, Any]) -> list[str]:
        """What of `preprocessing` a run has otherwise, in words; numbers are the same to a part in
        a thousand.
        """
        return [
            f"{key}: {plain(given.get(key))} instead of {plain(value)}"
            for key, value in self.preprocessing.items()
            if not _same(plain(given.get(key)), plain(value))
        ]

    def chosen(self, names: Sequence[str]) -> list[str]:
        """The folds `names`, by default all numbered ones, or `all`; CheckpointError."""
        missing = [name for name in names if name not in self.folds]
        if missing:
            raise CheckpointError(
                f"{self.folder}: no fold {', '.join(missing)}; there is {', '.join(self.folds)}"
            )
        numbered = [name for name in self.folds if name != "all"]
        return list(names) or numbered or list(self.folds)


def read_results(folder: str | Path) -> Results:
    """Read plans.json and dataset.json of a results folder; CheckpointError for what is not known,
    by its name.
    """
    folder = Path(folder)
    parts = folder.resolve().name.split("__")
    if len(parts) != 3 or not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected the folder of an nnU-Net's results, called "
            "TRAINER__PLANS__CONFIGURATION, such as nnUNetTrainer__nnUNetPlans__3d_fullres"
        )
    check_trainer(parts[0], str(folder))
    plans = read_json(folder / "plans.json")
    described = read_json(folder / "dataset.json")
    source = f"{folder / 'plans.json'}, {parts[2]}"
    plan = _inherited(plans, parts[2], source)
    _check_kind(plan, source)
    forward = _numbers(plans.get("transpose_forward"), 3, int, f"{source}: transpose_forward")
    if sorted(forward) != [0, 1, 2]:
        raise CheckpointError(f"{source}: transpose_forward is {forward}, expected 0, 1 and 2")
    axes = tuple(2 - axis for axis in forward)  # nnU-Net reads z, y, x
    channels = described.get("channel_names", described.get("modality"))
    if not isinstance(channels, dict) or not channels:
        raise CheckpointError(f"{folder / 'dataset.json'}: no 'channel_names'")
    classes, regions, order, ignore = _classes(described, folder / "dataset.json")
    spacing = _numbers(plan.get("spacing"), 3, float, f"{source}: spacing")
    patch = _numbers(plan.get("patch_size"), 3, int, f"{source}: patch_size")
    if min(spacing) <= 0 or not all(1 <= side <= 4096 for side in patch):
        raise CheckpointError(f"{source}: spacing {spacing}, patch_size {patch}")
    batch = plan.get("batch_size")
    reader = plans.get("image_reader_writer", "SimpleITKIO")
    reader = described.get("overwrite_image_reader_writer", reader)
    if reader not in READERS:
        raise CheckpointError(f"{source}: reads by '{reader}'; known: {', '.join(READERS)}")
    return Results(
        folder=folder,
        configuration=parts[2],
        in_channels=len(channels),
        classes=classes,
        regions=regions,
        regions_class_order=order,
        ignore=ignore,
        network=_network(plan, source) | {"axes": list(axes)},
        orientation=READERS[reader],
        spacing=_of_image(spacing, axes),
        patch_size=_of_image(patch, axes),
        intensity_channels=_intensities(plans, plan, len(channels), source),
        folds=_folds(folder),
        dataset=str(plans.get("dataset_name", "")),
        batch_size=batch if type(batch) is int and 1 <= batch <= 1024 else 2,
    )


def load_fold(results: Results, fold: str) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Weights of a fold, under the names of the file, and the axes of our images along which
    nnU-Net mirrors to predict; CheckpointError.
    """
    path = results.folds[fold]
    content = load_foreign(path)
    trainer, weights = content.get("trainer_name"), content.get("network_weights")
    check_trainer(trainer, str(path))
    given = content.get("init_args")
    configuration = given.get("configuration") if isinstance(given, dict) else None
    if configuration != results.configuration:
        raise CheckpointError(
            f"{path}: trained as {configuration!r}, but its folder is that of "
            f"{results.configuration}"
        )
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path}: no 'network_weights'")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: network_weights has {key!r}, which is no tensor")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {key} has values that are not finite")
    mirrored = content.get("inference_allowed_mirroring_axes")
    allowed = mirrored is None or (
        isinstance(mirrored, (list, tuple)) and all(axis in (0, 1, 2) for axis in mirrored)
    )
    if not allowed:
        raise CheckpointError(f"{path}: inference_allowed_mirroring_axes is {mirrored!r}")
    axes = results.network["axes"]
    return weights, tuple(sorted(axes[int(axis)] for axis in mirrored or ()))


def check_trainer(name: object, source: str) -> None:
    """CheckpointError for a trainer that may change the network."""
    if not isinstance(name, str) or not TRAINER.fullmatch(name):
        raise CheckpointError(
            f"{source}: trained by '{name}', which may have another network than the plans; known "
            "are nnUNetTrainer and its variants of loss, schedule, augmentation and mirroring"
        )


def read_json(path: Path) -> dict:
    """The object that a file of a results folder holds; CheckpointError."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({str(error)[:200]})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _inherited(plans: Mapping, name: str, source: str) -> dict:
    """A configuration of the plans with what it takes over from others."""
    known, chain = plans.get("configurations"), []
    while name is not None:
        found = known.get(name) if isinstance(known, dict) and isinstance(name, str) else None
        if not isinstance(found, dict) or name in [seen for seen, _ in chain]:
            shown = ", ".join(known) if isinstance(known, dict) else "none"
            raise CheckpointError(f"{source}: no configuration {name!r}; there is {shown}")
        chain.append((name, found))
        name = found.get("inherits_from")
    result: dict = {}
    for _, found in reversed(chain):
        result |= found
    return result


def _check_kind(plan: Mapping, source: str) -> None:
    """CheckpointError for cascades, 2D, and preprocessing other than nnU-Net's default."""
    if plan.get("previous_stage"):
        raise CheckpointError(
            f"{source}: the second stage of a cascade, which also sees the labels of the first; "
            "take 3d_fullres or 3d_lowres"
        )
    size = plan.get("patch_size")
    if isinstance(size, list) and len(size) == 2:
        raise CheckpointError(f"{source}: a 2D network; take 3d_fullres or 3d_lowres")
    preprocessor = plan.get("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise CheckpointError(f"{source}: preprocessor '{preprocessor}' is not known")
    resampling = plan.get("resampling_fn_data", "resample_data_or_seg_to_shape")
    how = plan.get("resampling_fn_data_kwargs", RESAMPLING)
    if resampling != "resample_data_or_seg_to_shape" or how != RESAMPLING:
        raise CheckpointError(f"{source}: resampling by '{resampling}' with {how} is not known")


def _network(plan: Mapping, source: str) -> dict[str, Any]:
    """The arguments of networks.nnunet.NnUNet, less the axes."""
    architecture = plan.get("architecture")
    if architecture is None:
        return _old_network(plan, source)
    if not isinstance(architecture, dict):
        raise CheckpointError(f"{source}: architecture is {architecture!r}")
    name, given = architecture.get("network_class_name"), architecture.get("arch_kwargs")
    if name not in ENCODERS:
        raise CheckpointError(
            f"{source}: network '{name}' is not known; known are {', '.join(ENCODERS)}"
        )
    if not isinstance(given, dict):
        raise CheckpointError(f"{source}: arch_kwargs is {given!r}")
    imported = architecture.get("_kw_requires_import", [])
    if not isinstance(imported, list) or not set(map(str, imported)) <= IMPORTED:
        known = ", ".join(sorted(IMPORTED))
        raise CheckpointError(f"{source}: _kw_requires_import is {imported!r}; known are {known}")
    encoder, given = ENCODERS[name], dict(given)

    def taken(key: str, default: Any = None) -> Any:
        return given.pop(key, default)

    result = {
        "encoder": encoder,
        "features_per_stage": taken("features_per_stage"),
        "kernel_sizes": taken("kernel_sizes"),
        "strides": taken("strides"),
        "blocks_per_stage": taken(BLOCKS[encoder]),
        "convs_per_stage_decoder": taken("n_conv_per_stage_decoder"),
        "conv_bias": taken("conv_bias", False),
    }
    depth = taken("n_stages")
    if type(depth) is not int or not 1 <= depth <= 100:
        raise CheckpointError(f"{source}: n_stages is {depth!r}")
    for key, count in (
        *((key, depth) for key in ("features_per_stage", "kernel_sizes", "strides")),
        *(("blocks_per_stage", depth), ("convs_per_stage_decoder", depth - 1)),
    ):
        if type(result[key]) is int:  # one number for all stages
            result[key] = [result[key]] * count
    convolution = taken("conv_op")
    if convolution not in ("torch.nn.modules.conv.Conv3d", "torch.nn.Conv3d"):
        raise CheckpointError(f"{source}: conv_op '{convolution}' is not torch's Conv3d")
    result["norm"] = _torch_name(taken("norm_op"), "norm_op", source)
    result["norm_args"] = _arguments(taken("norm_op_kwargs"), {"eps", "affine", "momentum"}, source)
    result["nonlin"] = _torch_name(taken("nonlin"), "nonlin", source)
    nonlin = _arguments(taken("nonlin_kwargs"), {"inplace", "negative_slope", "alpha"}, source)
    result["nonlin_args"] = {key: value for key, value in nonlin.items() if key != "inplace"}
    dropout, how = taken("dropout_op"), taken("dropout_op_kwargs")
    if dropout is not None:
        if _torch_name(dropout, "dropout_op", source) != "Dropout3d":
            raise CheckpointError(f"{source}: dropout_op '{dropout}' is not torch's Dropout3d")
        result["dropout"] = _arguments(how, {"p", "inplace"}, source).get("p", 0.5)
    if encoder == "residual" and given.get("stem_channels"):
        result["stem_channels"] = given["stem_channels"]
    given.pop("stem_channels", None)
    given.pop("deep_supervision", None)  # says what training returns
    unknown = [key for key, value in given.items() if value not in (None, False)]
    if unknown:
        raise CheckpointError(
            f"{source}: {name} with {', '.join(map(str, unknown))}, which is not known here"
        )
    return _plain(result, source)


def _old_network(plan: Mapping, source: str) -> dict[str, Any]:
    """As `_network`, of plans from before 2024, which TotalSegmentator's weights still have."""
    name = plan.get("UNet_class_name")
    if name not in OLD_CLASSES:
        raise CheckpointError(
            f"{source}: network '{name}' is not known; known are {', '.join(OLD_CLASSES)}"
        )
    first, most = plan.get("UNet_base_num_features"), plan.get("unet_max_num_features")
    blocks = plan.get("n_conv_per_stage_encoder")
    if type(first) is not int or type(most) is not int or not isinstance(blocks, list):
        raise CheckpointError(f"{source}: no numbers of features, or of convolutions of the stages")
    if len(blocks) > 100:
        raise CheckpointError(f"{source}: {len(blocks)} stages")
    return _plain(
        {
            "encoder": OLD_CLASSES[name],
            "features_per_stage": [min(first * 2**k, most) for k in range(len(blocks))],
            "kernel_sizes": plan.get("conv_kernel_sizes"),
            "strides": plan.get("pool_op_kernel_sizes"),
            "blocks_per_stage": blocks,
            "convs_per_stage_decoder": plan.get("n_conv_per_stage_decoder"),
            "conv_bias": True,
            "norm": "InstanceNorm3d",
            "norm_args": {"eps": 1e-5, "affine": True},
            "nonlin": "LeakyReLU",
            "nonlin_args": {},
        },
        source,
    )


def _plain(arguments: dict[str, Any], source: str) -> dict[str, Any]:
    """The same; CheckpointError unless its lists are lists of whole numbers."""
    lists = ("features_per_stage", "blocks_per_stage", "convs_per_stage_decoder")
    for key in (*lists, "kernel_sizes", "strides"):
        values = arguments[key]
        ok = isinstance(values, list) and len(values) <= 100
        for value in values if ok else ():
            nested = isinstance(value, list) and key not in lists
            whole = value if nested else [value]
            ok = ok and all(type(number) is int for number in whole)
        if not ok:
            raise CheckpointError(f"{source}: {key} is {str(values)[:200]}")
    if type(arguments["conv_bias"]) is not bool:
        raise CheckpointError(f"{source}: conv_bias is {arguments['conv_bias']!r}")
    return arguments


def _torch_name(value: object, key: str, source: str) -> str:
    """'torch.nn.modules.instancenorm.InstanceNorm3d' -> 'InstanceNorm3d'."""
    match = re.fullmatch(r"torch\.nn\.(modules\.\w+\.)?(\w+)", value if type(value) is str else "")
    if not match:
        raise CheckpointError(f"{source}: {key} '{value}' is not one of torch.nn")
    return match[2]


def _arguments(value: object, known: set[str], source: str) -> dict[str, Any]:
    """Keyword arguments that are numbers; CheckpointError for others."""
    given = {} if value is None else value
    if not isinstance(given, dict):
        raise CheckpointError(f"{source}: keyword arguments are {value!r}")
    for key, item in given.items():
        if key not in known or type(item) not in (int, float, bool) or not math.isfinite(item):
            raise CheckpointError(f"{source}: the keyword argument {key}={item!r} is not known")
    return given


def _classes(
    described: Mapping, path: Path
) -> tuple[dict[str, tuple[int, ...]], bool, tuple[int, ...], int | None]:
    """Name -> ids in the order of the outputs; whether these are regions, and the ids that they are
    painted with; the id of voxels that nobody labelled.
    """
    labels = described.get("labels")
    wrong = CheckpointError(f"{path}: 'labels' is {str(labels)[:300]}, expected names and ids")
    if not isinstance(labels, dict):
        raise wrong
    ids = {}
    for name, value in labels.items():
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(type(k) is int and 0 <= k < 256 for k in numbers):
            raise wrong
        ids[name] = tuple(numbers)
    ignored = ids.pop("ignore", None)
    ignore = None if ignored is None else ignored[0]
    if not any(len(numbers) > 1 for numbers in ids.values()):
        ordered = dict(sorted(ids.items(), key=lambda item: item[1]))
        if [numbers[0] for numbers in ordered.values()] != list(range(len(ordered))):
            raise CheckpointError(f"{path}: 'labels' has the ids {sorted(ids.values())}")
        return ordered, False, (), ignore
    regions = {name: numbers for name, numbers in ids.items() if set(numbers) != {0}}
    order = described.get("regions_class_order")
    order = _numbers(order, len(regions), int, f"{path}: regions_class_order")
    return regions, True, order, ignore


def _intensities(plans: Mapping, plan: Mapping, channels: int, source: str) -> tuple[dict, ...]:
    """`intensity_channels` of a configuration."""
    schemes, masks = plan.get("normalization_schemes"), plan.get("use_mask_for_norm")
    told = plans.get("foreground_intensity_properties_per_channel")
    if told is None:
        told = plans.get("foreground_intensity_properties_by_modality")  # as it was once called
    lists = isinstance(schemes, list) and isinstance(masks, list) and isinstance(told, dict)
    if not lists or len(schemes) != channels or len(masks) != channels:
        raise CheckpointError(
            f"{source}: normalization_schemes {schemes!r} and use_mask_for_norm {masks!r}, "
            f"expected one of each for {channels} channel(s)"
        )
    result = []
    for number, (scheme, mask) in enumerate(zip(schemes, masks)):
        if scheme not in SCHEMES:
            raise CheckpointError(
                f"{source}: normalisation '{scheme}' is not known; known are {', '.join(SCHEMES)}"
            )
        entry: dict[str, Any] = {"scheme": scheme}
        if scheme == "CTNormalization":
            numbers = told.get(str(number))
            values = [numbers.get(key) if isinstance(numbers, dict) else None for key in CT_NUMBERS]
            values = _numbers(values, len(CT_NUMBERS), float, f"{source}: CTNormalization")
            entry |= dict(zip(CT_NUMBERS, values))
        elif scheme == "ZScoreNormalization":
            entry["mask"] = bool(mask)
        result.append(entry)
    return tuple(result)


def _folds(folder: Path) -> dict[str, Path]:
    """Name -> checkpoint of the folds that are there, the numbered ones in order."""
    found = {}
    for inner in sorted(folder.glob("fold_*")):
        files = [inner / name for name in WEIGHTS if (inner / name).is_file()]
        if files:
            found[inner.name.removeprefix("fold_")] = files[0]
    if not found:
        raise CheckpointError(f"{folder}: no fold_*/{WEIGHTS[0]}")
    return found


def _numbers(values: object, count: int, kind: type, source: str) -> tuple:
    """`count` finite numbers as `kind`; CheckpointError."""
    numbers = (int,) if kind is int else (int, float)
    wanted = isinstance(values, list) and len(values) == count
    if not wanted or not all(type(v) in numbers and math.isfinite(v) for v in values):
        raise CheckpointError(f"{source} is {str(values)[:200]}, expected {count} numbers")
    return tuple(kind(value) for value in values)


def _same(found: Any, expected: Any) -> bool:
    """Whether two plain values are the same; numbers to a part in a thousand."""
    if isinstance(found, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        same_keys = found.keys() == expected.keys()
        return same_keys and all(_same(found[key], expected[key]) for key in found)
    if type(found) in (int, float) and type(expected) in (int, float):
        return math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-6)
    return found == expected


def _of_image(values: Sequence, axes: Sequence[int]) -> tuple:
    """What stands in nnU-Net's order of axes -> in that of our images."""
    return tuple(values[list(axes).index(axis)] for axis in range(3))
