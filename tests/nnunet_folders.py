"""Small data sets and results folders in the formats of nnU-Net v2, made for the tests."""

import json

import nibabel as nib
import numpy as np
import torch

from networks.nnunet import NnUNet

CT = {"mean": 40.0, "std": 25.0, "percentile_00_5": -60.0, "percentile_99_5": 160.0}
LABELS = {"background": 0, "organ": 1, "lesion": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}


def write_raw(
    folder,
    channels=("CT",),
    labels=LABELS,
    count=5,
    shape=(26, 30, 18),
    spacing=(1, 1, 1.5),
    seed=0,
):
    """A raw data set: a block of organ with a lesion in it, in noise; MRI in a field of zeros."""
    rng = np.random.default_rng(seed)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    described = {
        "channel_names": {str(k): name for k, name in enumerate(channels)},
        "labels": labels,
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    if any(isinstance(ids, list) for ids in labels.values()):
        described["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(described))
    for number in range(count):
        shape_here = [side + int(rng.integers(0, 3)) for side in shape]
        spacing_here = [side * float(rng.uniform(0.9, 1.1)) for side in spacing]
        label = np.zeros(shape_here, np.uint8)
        middle = tuple(slice(side // 4, side - side // 4) for side in shape_here)
        label[middle] = 1
        inner = tuple(slice(side // 2 - 2, side // 2 + 2) for side in shape_here)
        label[inner] = 2
        affine = np.diag([*spacing_here, 1.0])
        for channel, name in enumerate(channels):
            image = 60.0 * label + rng.normal(0, 15, shape_here)
            if name == "CT":
                image -= 50
            else:  # zeros around what is scanned
                outside = np.ones(shape_here, bool)
                outside[tuple(slice(side // 5, side - side // 5) for side in shape_here)] = False
                image = np.where(outside, 0, image + 200)
            file = folder / f"imagesTr/case_{number}_{channel:04d}.nii.gz"
            nib.save(nib.Nifti1Image(image.astype(np.float32), affine), file)
        nib.save(nib.Nifti1Image(label, affine), folder / f"labelsTr/case_{number}.nii.gz")
    names = [f"case_{number}" for number in range(count)]
    folds = [{"train": [n for n in names if n != held], "val": [held]} for held in names]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    return folder


def make_plans(encoder="plain", old=False, channels=1, scheme="CTNormalization", **changes):
    """plans.json of a network of three stages, its axes as stored; `changes` are of 3d_fullres."""
    blocks = {"plain": "n_conv_per_stage", "residual": "n_blocks_per_stage"}[encoder]
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 24, 24],
        "spacing": [1.5, 1.0, 1.0],
        "normalization_schemes": [scheme] * channels,
        "use_mask_for_norm": [scheme == "ZScoreNormalization"] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {
            "is_seg": False,
            "order": 3,
            "order_z": 0,
            "force_separate_z": None,
        },
    }
    kernels, strides = [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    name = {"plain": "PlainConvUNet", "residual": "ResidualEncoderUNet"}[encoder]
    if old:
        configuration |= {
            "UNet_class_name": name,
            "UNet_base_num_features": 4,
            "unet_max_num_features": 8,
            "n_conv_per_stage_encoder": [1, 2, 2],
            "n_conv_per_stage_decoder": [1, 1],
            "num_pool_per_axis": [1, 2, 2],
            "pool_op_kernel_sizes": strides,
            "conv_kernel_sizes": kernels,
        }
    else:
        configuration["architecture"] = {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 8, 8],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": kernels,
                "strides": strides,
                blocks: [1, 2, 2],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }
    return {
        "dataset_name": "Dataset900_Test",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {str(k): CT for k in range(channels)},
        "configurations": {
            "3d_fullres": configuration | changes,
            "3d_lowres": {"inherits_from": "3d_fullres", "spacing": [3.0, 2.0, 2.0]},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            "2d": {"patch_size": [32, 32], "spacing": [1.0, 1.0]},
        },
    }


def plan_arguments(encoder="plain"):
    """The arguments of the network of `make_plans`."""
    return {
        "encoder": encoder,
        "features_per_stage": [4, 8, 8],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "blocks_per_stage": [1, 2, 2],
        "convs_per_stage_decoder": [1, 1],
    }


def with_aliases(state, deep=3):
    """A state dict of ours under all the names that nnU-Net's files have, with its lower heads."""
    full = {}
    for key, value in state.items():
        keys = [key]
        if ".conv." in key or ".norm." in key:
            other = key.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
            keys.append(other)
        for name in keys:
            full[name] = value
            if name.startswith("encoder."):
                full[f"decoder.{name}"] = value
    head = full[f"decoder.seg_layers.{deep - 2}.weight"]
    for lower in range(deep - 2):
        full[f"decoder.seg_layers.{lower}.weight"] = torch.zeros(head.shape[0], 8, 1, 1, 1)
        full[f"decoder.seg_layers.{lower}.bias"] = torch.zeros(head.shape[0])
    return full


def write_results(
    parent,
    arguments,
    plans=None,
    folds=("0",),
    labels=LABELS,
    channels=("CT",),
    configuration="3d_fullres",
    trainer="nnUNetTrainer",
    **content,
):
    """A results folder with networks of `arguments` and random weights -> the folder."""
    plans = make_plans() if plans is None else plans
    folder = parent / f"{trainer}__nnUNetPlans__{configuration}"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    described = {"channel_names": {str(k): n for k, n in enumerate(channels)}, "labels": labels}
    described |= {"file_ending": ".nii.gz", "numTraining": 5}
    outputs = len(labels)
    if any(isinstance(ids, list) for ids in labels.values()):
        described["regions_class_order"] = [1, 2]
        outputs -= 1
    outputs -= "ignore" in labels
    (folder / "dataset.json").write_text(json.dumps(described))
    for number, fold in enumerate(folds):
        torch.manual_seed(number)
        network = NnUNet(len(channels), outputs, **arguments)
        (folder / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": with_aliases(network.state_dict()),
                "trainer_name": trainer,
                "init_args": {"configuration": configuration, "fold": fold},
                "inference_allowed_mirroring_axes": (0, 1, 2),
                "current_epoch": 1,
                # as real files have it: a NumPy scalar
                "_best_ema": np.float32(0.5),
            }
            | content,
            folder / f"fold_{fold}/checkpoint_final.pth",
        )
    return folder
