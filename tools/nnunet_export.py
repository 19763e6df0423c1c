"""Results folders of nnU-Net with students in them. Used by tools/export.py.

A student of nnU-Net's own architecture (`student: nnunet`), trained on images that are prepared as
the plans say, needs none of this project's code where nnU-Net is at hand: nnU-Net reads, prepares,
predicts and writes by itself what a results folder tells it.

    DatasetXXX_Name/nnUNetTrainer__PLANS__CONFIGURATION/
        plans.json                     of the nnU-Net; of its configuration `architecture` and
                                       `patch_size` are the student's
        dataset.json                   channels, and the student's classes or regions
        dataset_fingerprint.json       a copy, where there is one
        fold_0/checkpoint_final.pth    the weights, under nnU-Net's names
        model_card.md

    nnUNetv2_predict_from_modelfolder -i SCANS -o LABELS -m FOLDER -f 0
    predict_3d.py --tta                with mirrors, which are nnU-Net's default; predict_3d.py
                                       without it is nnU-Net with --disable_tta

Labels of the two differ where nnU-Net goes its own way: it weights overlapping windows by a
Gaussian, spaces them evenly, brings logits, not labels, to the grid of the scan, and pads a scan
that is smaller than a window before it mirrors it, not after.
"""

import inspect
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from networks.nnunet import NnUNet, nnunet_weights, own_weights, triple
from utils import nnunet
from utils.checkpoint import load_network_weights
from utils.config import ConfigError

TRAINER, FINGERPRINT = "nnUNetTrainer", "dataset_fingerprint.json"
EPOCH = 250  # steps of an epoch of nnU-Net
# Keys of dataset.json that nnU-Net predicts by; others may have the names of patients
KEPT = ("name", "channel_names", "modality", "file_ending", "overwrite_image_reader_writer")
# What plans from before 2024 have in place of `architecture`
OLD_KEYS = {
    *("UNet_class_name", "UNet_base_num_features", "unet_max_num_features"),
    *("n_conv_per_stage_encoder", "n_conv_per_stage_decoder", "num_pool_per_axis"),
    *("pool_op_kernel_sizes", "conv_kernel_sizes"),
}
OTHERS = "choose onnx, openvino, torchscript or torch_export"


def write(
    parent: Path, checkpoint: Mapping[str, Any], network: nn.Module, plans: Path | None
) -> Path:
    """Write DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION to `parent` -> that folder.

    plans: results folder of an nnU-Net; default: that of the run's teacher. ConfigError for a
    student that is no network of these plans, CheckpointError for plans that cannot be read.
    """
    if not isinstance(network, NnUNet):
        raise ConfigError(
            f"--format nnunet: this student is a {checkpoint['network']['name']}, which nnU-Net "
            f"does not have; train one with --student nnunet, or {OTHERS}"
        )
    results = nnunet.read_results(plans_folder(checkpoint, plans))
    _check_fits(checkpoint, network, results)
    _, plans_name, configuration = results.folder.resolve().name.split("__")
    folder = parent / _dataset_name(results) / f"{TRAINER}__{plans_name}__{configuration}"
    (folder / "fold_0").mkdir(parents=True)
    content = _plans(checkpoint, results)
    described = _described(checkpoint, results)
    (folder / "plans.json").write_text(json.dumps(content, indent=4))
    (folder / "dataset.json").write_text(json.dumps(described, indent=4))
    if (results.folder / FINGERPRINT).is_file():
        shutil.copyfile(results.folder / FINGERPRINT, folder / FINGERPRINT)
    saved = {
        "network_weights": nnunet_weights(network),
        "trainer_name": TRAINER,
        "init_args": {
            "plans": content,
            "configuration": configuration,
            "fold": 0,
            "dataset_json": described,
        },
        "inference_allowed_mirroring_axes": _mirrors(checkpoint),
        "current_epoch": checkpoint["step"] // EPOCH,
    }
    torch.save(saved, weights_file(folder))
    return folder


def weights_file(folder: Path) -> Path:
    return folder / "fold_0" / nnunet.WEIGHTS[0]


def read_back(folder: Path) -> NnUNet:
    """The network of a folder that `write` wrote, by the reader of teachers."""
    results = nnunet.read_results(folder)
    weights, _ = nnunet.load_fold(results, "0")
    network = NnUNet(results.in_channels, len(results.classes), **results.network)
    load_network_weights(network, own_weights(weights, network), str(weights_file(folder)))
    return network.eval().requires_grad_(False)


def plans_folder(checkpoint: Mapping[str, Any], given: Path | None) -> Path:
    """The results folder with the plans: the one given, or that of the run's teacher."""
    if given:
        return given
    config = checkpoint["config"]
    named = config.get("teacher_checkpoint", "") if config.get("teacher") == "nnunet" else ""
    if not named or named.endswith(".pt"):
        raise ConfigError(
            "--format nnunet: this run names no results folder of an nnU-Net, whose plans tell how "
            "scans are prepared; give it with --plans FOLDER"
        )
    if not Path(named).is_dir():
        raise ConfigError(
            f"{named}: the results folder that the run names is not here; say where it is with "
            "--plans FOLDER"
        )
    return Path(named)


def _check_fits(checkpoint: Mapping, network: NnUNet, results: nnunet.Results) -> None:
    """ConfigError unless nnU-Net would give the student the images that it was trained on."""
    differ = results.unlike(checkpoint["dataset"])
    if network.in_channels != results.in_channels:
        differ.append(f"channels: {network.in_channels} instead of {results.in_channels}")
    if differ:
        raise ConfigError(
            f"--format nnunet: the plans of {results.folder} prepare scans in another way than "
            f"this run did ({'; '.join(differ)}); name the plans that it was trained by with "
            f"--plans, train by a configuration of tools/new_config.py --nnunet, or {OTHERS}"
        )
    axes = list(results.network["axes"])
    if list(network.axes) != axes:
        raise ConfigError(
            f"--format nnunet: the student's axes are {list(network.axes)}, those of the plans of "
            f"{results.folder} {axes}; train with network_args: {{nnunet: {{axes: {axes}}}}}, or "
            f"{OTHERS}"
        )


def _dataset_name(results: nnunet.Results) -> str:
    """DatasetXXX_Name, by which `nnUNetv2_predict -d` finds a folder."""
    for name in (results.dataset, results.folder.resolve().parent.name):
        if re.fullmatch(r"Dataset\d{3}_[^/\\]+", name):
            return name
    return "Dataset000_Unnamed"


def _plans(checkpoint: Mapping, results: nnunet.Results) -> dict:
    """plans.json, with architecture and patch of the student."""
    plans = nnunet.read_json(results.folder / "plans.json")
    kept = plans["configurations"][results.configuration]
    kept = {key: value for key, value in kept.items() if key not in OLD_KEYS}
    arguments = checkpoint["network"]["arguments"]
    patch = [checkpoint["config"]["patch_size"][axis] for axis in results.network["axes"]]
    plans["configurations"][results.configuration] = kept | {
        "patch_size": patch,
        "architecture": architecture(arguments),
    }
    return plans


def architecture(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`architecture` of a configuration of plans, for arguments of NnUNet; those that are left out
    have its defaults.
    """
    defaults = {
        key: parameter.default for key, parameter in inspect.signature(NnUNet).parameters.items()
    }
    given = defaults | dict(arguments)
    residual = given["encoder"] == "residual"
    norm_args, nonlin_args = given["norm_args"], given["nonlin_args"] or {}
    if norm_args is None:
        norm_args = {"eps": 1e-5, "affine": True}
    if given["nonlin"] != "GELU":  # which has no such argument
        nonlin_args = {"inplace": True} | nonlin_args
    inner = {
        "n_stages": len(given["features_per_stage"]),
        "features_per_stage": list(given["features_per_stage"]),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(triple(kernel)) for kernel in given["kernel_sizes"]],
        "strides": [list(triple(step)) for step in given["strides"]],
        nnunet.BLOCKS[given["encoder"]]: list(given["blocks_per_stage"]),
        "n_conv_per_stage_decoder": list(given["convs_per_stage_decoder"]),
        "conv_bias": given["conv_bias"],
        "norm_op": f"torch.nn.{given['norm']}",
        "norm_op_kwargs": dict(norm_args),
        "dropout_op": "torch.nn.Dropout3d" if given["dropout"] else None,
        "dropout_op_kwargs": {"p": given["dropout"]} if given["dropout"] else None,
        "nonlin": f"torch.nn.{given['nonlin']}",
        "nonlin_kwargs": nonlin_args,
    }
    if residual and given["stem_channels"]:
        inner["stem_channels"] = given["stem_channels"]
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": inner,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _described(checkpoint: Mapping, results: nnunet.Results) -> dict:
    """dataset.json: channels and files of the nnU-Net; the student's classes or regions, in the
    order of its outputs.
    """
    told = nnunet.read_json(results.folder / "dataset.json")
    described = {key: told[key] for key in KEPT if key in told}
    described.setdefault("file_ending", ".nii.gz")
    cases = checkpoint.get("cases", {})
    described["numTraining"] = len(cases.get("train") or cases.get("labelled") or ())
    dataset, names = checkpoint["dataset"], list(checkpoint["class_names"])
    labels: dict[str, Any] = {"background": 0}
    if dataset.get("regions"):
        labels |= {name: list(ids) for name, ids in dataset["regions"].items()}
        described["regions_class_order"] = list(dataset["regions_class_order"])
        used = {number for ids in dataset["regions"].values() for number in ids}
    else:
        labels |= {name: number for number, name in enumerate(names) if number}
        used = set(labels.values())
    # of no use to prediction; nnU-Net refuses a folder in which it is not the next free id
    if dataset.get("ignore_label") == max(used) + 1:
        labels["ignore"] = dataset["ignore_label"]
    return described | {"labels": labels}


def _mirrors(checkpoint: Mapping) -> tuple[int, ...] | None:
    """Axes, of nnU-Net's, along which its prediction may average mirrored copies: all, if training
    mirrored each axis by `flip_prob`.
    """
    return (0, 1, 2) if checkpoint["dataset"].get("flip_prob") else None
