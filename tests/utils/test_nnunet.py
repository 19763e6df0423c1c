"""What is read of an nnU-Net's results folder, and what is refused of it, by name."""

import json
import pickle

import numpy as np
import pytest
import torch

from networks.nnunet import NnUNet, own_weights
from tests.nnunet_folders import CT, LABELS, REGIONS, make_plans, plan_arguments, write_results
from utils import nnunet
from utils.checkpoint import CheckpointError, load_network_weights

ARGUMENTS = plan_arguments()


def of_plan(change, architecture=None):
    """Plans with one key of 3d_fullres, or of its architecture, changed."""
    plans = make_plans()
    target = plans["configurations"]["3d_fullres"]
    if architecture == "architecture":
        target = target["architecture"]
    elif architecture:
        target = target["architecture"]["arch_kwargs"]
    target |= change
    return plans


@pytest.mark.parametrize("encoder", ["plain", "residual"])
@pytest.mark.parametrize("old", [False, True])
def test_both_plans_formats_give_the_network(tmp_path, encoder, old):
    arguments = ARGUMENTS | {"encoder": encoder}
    folder = write_results(tmp_path, arguments, make_plans(encoder, old), folds=("0", "2"))
    found = nnunet.read_results(folder)
    network = NnUNet(found.in_channels, len(found.classes), **found.network)
    weights, mirrored = nnunet.load_fold(found, "2")
    load_network_weights(network, own_weights(weights, network), "test")
    torch.manual_seed(1)  # of the second fold
    expected = NnUNet(1, 3, **arguments)
    image = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(network(image), expected(image))
    assert mirrored == (0, 1, 2)
    assert list(found.folds) == ["0", "2"] == found.chosen(()) and found.chosen(["2"]) == ["2"]
    with pytest.raises(CheckpointError, match=r"no fold 7; there is 0, 2"):
        found.chosen(["7"])


def test_axes_preprocessing_and_what_is_inherited(tmp_path):
    plans = make_plans() | {"transpose_forward": [2, 0, 1]}
    folder = write_results(tmp_path, ARGUMENTS, plans, configuration="3d_lowres")
    found = nnunet.read_results(folder)
    # nnU-Net read z, y, x and put the third, x, first: x, z, y
    assert found.network["axes"] == [0, 2, 1]
    assert found.spacing == (3.0, 2.0, 2.0) and found.patch_size == (16, 24, 24)
    plans["configurations"]["3d_lowres"] |= {"spacing": [3.0, 2.0, 1.0], "patch_size": [8, 16, 24]}
    (folder / "plans.json").write_text(json.dumps(plans))
    found = nnunet.read_results(folder)
    assert found.spacing == (3.0, 1.0, 2.0) and found.patch_size == (8, 24, 16)
    assert found.preprocessing == {
        "orientation": "",
        "spacing": (3.0, 1.0, 2.0),
        "intensity": "nnunet",
        "intensity_channels": ({"scheme": "CTNormalization", **CT},),
        "crop_foreground": True,
    }
    plans["image_reader_writer"] = "NibabelIOWithReorient"
    (folder / "plans.json").write_text(json.dumps(plans))
    assert nnunet.read_results(folder).orientation == "RAS"


def test_mirroring_axes_are_those_of_the_image(tmp_path):
    plans = make_plans() | {"transpose_forward": [2, 0, 1]}
    options = {"trainer": "nnUNetTrainer_onlyMirror01", "inference_allowed_mirroring_axes": (0, 1)}
    found = nnunet.read_results(write_results(tmp_path, ARGUMENTS, plans, **options))
    assert nnunet.load_fold(found, "0")[1] == (0, 2)
    options = {"trainer": "nnUNetTrainerNoMirroring", "inference_allowed_mirroring_axes": None}
    found = nnunet.read_results(write_results(tmp_path, ARGUMENTS, plans, **options))
    assert nnunet.load_fold(found, "0")[1] == ()


def test_classes_and_regions(tmp_path):
    labels = {"lesion": 2, "background": 0, "organ": 1, "ignore": 3}
    found = nnunet.read_results(write_results(tmp_path / "a", ARGUMENTS, labels=labels))
    assert found.classes == {"background": (0,), "organ": (1,), "lesion": (2,)}
    assert (found.ignore, found.regions) == (3, False)
    assert found.outputs(["background", "lesion", "organ"], "here") == [0, 2, 1]
    with pytest.raises(CheckpointError, match="its classes are background, organ, lesion"):
        found.outputs(["background", "organ", "vessel"], "here")
    found = nnunet.read_results(write_results(tmp_path / "b", ARGUMENTS, labels=REGIONS))
    assert found.classes == {"whole": (1, 2), "core": (2,)}
    assert found.regions and found.regions_class_order == (1, 2)
    assert found.outputs(["core", "whole"], "here") == [1, 0]


@pytest.mark.parametrize(
    "name, known",
    [
        ("nnUNetTrainer", True),
        ("nnUNetTrainer_250epochs_NoMirroring", True),
        ("nnUNetTrainer_DASegOrd0_NoMirroring", True),
        ("nnUNetTrainerDiceCELoss_noSmooth", True),
        ("nnUNetTrainerBN", False),
        ("nnUNet_Primus_M_Trainer", False),
        ("nnUNetTrainerUMambaBot", False),
        ("nnUNetTrainer\n", False),
        (None, False),
    ],
)
def test_trainers_that_may_change_the_network_are_refused(name, known):
    if known:
        nnunet.check_trainer(name, "file")
    else:
        with pytest.raises(CheckpointError, match="may have another network"):
            nnunet.check_trainer(name, "file")


UNET = "dynamic_network_architectures.architectures.unet"


@pytest.mark.parametrize(
    "plans, expected",
    [
        (of_plan({"previous_stage": "3d_lowres"}), "cascade"),
        (of_plan({"patch_size": [32, 32]}), "2D network"),
        (of_plan({"preprocessor_name": "Own"}), "preprocessor 'Own'"),
        (of_plan({"resampling_fn_data": "resample_torch_fornnunet"}), "resample_torch_fornnunet"),
        (of_plan({"resampling_fn_data_kwargs": {"order": 1}}), r"\{'order': 1\}"),
        (of_plan({"normalization_schemes": ["OwnNormalization"]}), "OwnNormalization"),
        (of_plan({"normalization_schemes": []}), r"one of each for 1 channel\(s\)"),
        (of_plan({"spacing": [1.0, "1.0", 1.0]}), "spacing is"),
        (of_plan({"spacing": [1.0, 0.0, 1.0]}), "spacing"),
        (of_plan({"patch_size": [10**9, 1, 1]}), "patch_size"),
        (of_plan({"inherits_from": "3d_fullres"}), "no configuration '3d_fullres'"),
        (of_plan({"inherits_from": ["x"]}), "no configuration"),
        (of_plan({"network_class_name": "os.system"}, "architecture"), "'os.system' is not known"),
        (of_plan({"network_class_name": f"{UNET}.ResidualUNet"}, "architecture"), "ResidualUNet"),
        (of_plan({"_kw_requires_import": ["block"]}, "architecture"), "_kw_requires_import"),
        (of_plan({"arch_kwargs": []}, "architecture"), "arch_kwargs"),
        (of_plan({"conv_op": "torch.nn.modules.conv.Conv2d"}, "arch_kwargs"), "Conv2d"),
        (of_plan({"norm_op": "os.system"}, "arch_kwargs"), "norm_op 'os.system'"),
        (of_plan({"norm_op_kwargs": {"eps": "x"}}, "arch_kwargs"), "eps='x'"),
        (of_plan({"norm_op_kwargs": {"device": 1}}, "arch_kwargs"), "device=1"),
        (of_plan({"dropout_op": "torch.nn.AlphaDropout"}, "arch_kwargs"), "AlphaDropout"),
        (of_plan({"nonlin_first": True}, "arch_kwargs"), "nonlin_first"),
        (of_plan({"squeeze_excitation": True}, "arch_kwargs"), "squeeze_excitation"),
        (of_plan({"n_stages": 10**9, "kernel_sizes": 3}, "arch_kwargs"), "n_stages"),
        (of_plan({"kernel_sizes": [["3"]]}, "arch_kwargs"), "kernel_sizes"),
        (of_plan({"features_per_stage": None}, "arch_kwargs"), "features_per_stage"),
        (make_plans() | {"transpose_forward": [0, 0, 1]}, "transpose_forward"),
        (make_plans() | {"image_reader_writer": "Tiff3DIO"}, "reads by 'Tiff3DIO'"),
        (make_plans() | {"configurations": 3}, "there is none"),
        ([], "expected an object"),
    ],
)
def test_plans_that_are_not_known_are_refused(tmp_path, plans, expected):
    folder = write_results(tmp_path, ARGUMENTS, plans)
    with pytest.raises(CheckpointError, match=expected) as error:
        nnunet.read_results(folder)
    assert "plans.json" in str(error.value)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="TRAINER__PLANS__CONFIGURATION"):
        nnunet.read_results(tmp_path)
    folder = write_results(tmp_path, ARGUMENTS)
    (folder / "plans.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        nnunet.read_results(folder)
    (folder / "plans.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        nnunet.read_results(folder)
    (folder / "plans.json").write_text(json.dumps(make_plans()))
    (folder / "fold_0/checkpoint_final.pth").rename(folder / "fold_0/checkpoint_best.pth")
    assert nnunet.read_results(folder).folds["0"].name == "checkpoint_best.pth"
    (folder / "fold_0/checkpoint_best.pth").unlink()
    with pytest.raises(CheckpointError, match="no fold_"):
        nnunet.read_results(folder)
    cascade = write_results(tmp_path, ARGUMENTS, configuration="3d_cascade_fullres")
    with pytest.raises(CheckpointError, match="second stage of a cascade"):
        nnunet.read_results(cascade)


class Runs:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"trainer_name": "nnUNetTrainerBN"}, "nnUNetTrainerBN"),
        ({"init_args": {"configuration": "2d"}}, "trained as '2d'"),
        ({"init_args": None}, "trained as None"),
        ({"network_weights": {}}, "no 'network_weights'"),
        ({"network_weights": {"a": 3}}, "is no tensor"),
        ({"network_weights": {"a": torch.tensor([float("nan")])}}, "not finite"),
        ({"inference_allowed_mirroring_axes": (3,)}, "inference_allowed_mirroring_axes"),
        ({"logging": Runs()}, "nothing was executed"),
    ],
)
def test_hostile_checkpoints_are_refused(tmp_path, capsys, content, expected):
    folder = write_results(tmp_path, ARGUMENTS, **content)
    found = nnunet.read_results(folder)
    with pytest.raises(CheckpointError, match=expected):
        nnunet.load_fold(found, "0")
    assert "code was run" not in capsys.readouterr().out


def test_a_plain_pickle_is_not_run(tmp_path, capsys):
    folder = write_results(tmp_path, ARGUMENTS, labels=LABELS, _best_ema=np.float64(1))
    found = nnunet.read_results(folder)
    assert nnunet.load_fold(found, "0")
    found.folds["0"].write_bytes(pickle.dumps({"network_weights": Runs()}))
    with pytest.raises(CheckpointError):
        nnunet.load_fold(found, "0")
    assert "code was run" not in capsys.readouterr().out
