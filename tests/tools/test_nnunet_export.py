"""Students as results folders of nnU-Net: what is written, read back by the reader of teachers, and
what is refused. Beside nnU-Net itself: tests/test_nnunet.py.
"""

import json

import pytest
import torch

from networks import build_network
from networks.nnunet import NnUNet, NnUNetTeacher, nnunet_weights, own_weights
from tests.nnunet_folders import CT, make_plans, plan_arguments, with_aliases, write_results
from tools import nnunet_export
from utils import nnunet
from utils.checkpoint import CheckpointError
from utils.config import ConfigError

NARROW = {"features_per_stage": [2, 3, 5]}


def student_of(results, dataset=None, name="nnunet", **arguments):
    """A checkpoint and network as a run of the plans in `results` leaves them, not trained."""
    dataset = {"format": "nnunet", "flip_prob": 0.2} | results.preprocessing | (dataset or {})
    names = list(dataset.get("regions") or results.classes)
    if name == "nnunet":
        arguments = results.network | NARROW | arguments
    torch.manual_seed(3)
    network = build_network(name, results.in_channels, len(names), **arguments).eval()
    checkpoint = {
        "class_names": names,
        "step": 1000,
        "config": {
            "teacher": "nnunet",
            "teacher_checkpoint": str(results.folder),
            "patch_size": [16, 32, 24],
        },
        "dataset": dataset,
        "cases": {"train": ["case_a", "case_b"]},
        "network": {"name": name, "arguments": arguments},
    }
    return checkpoint, network


def test_weights_have_all_names_of_nnunets_files():
    arguments = plan_arguments("residual") | NARROW
    network = NnUNet(1, 2, **arguments)
    found = nnunet_weights(network)
    expected = with_aliases(network.state_dict())
    assert found.keys() == expected.keys()
    assert found["decoder.seg_layers.0.weight"].shape == (2, 3, 1, 1, 1)  # of the middle stage
    for key in found.keys() - {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}:
        assert torch.equal(found[key], expected[key]), key
    dropped = NnUNet(1, 2, **arguments, dropout=0.1)
    found = nnunet_weights(dropped)
    # dropout stands between; the second unit of a residual block has none
    assert "encoder.stages.0.blocks.0.conv1.all_modules.2.weight" in found
    assert "encoder.stages.0.blocks.0.conv2.all_modules.1.weight" in found
    own = own_weights(found, dropped)
    assert all(torch.equal(value, own[key]) for key, value in dropped.state_dict().items())


@pytest.mark.parametrize(
    "encoder, old, arguments",
    [
        ("plain", False, {}),
        (
            "plain",
            True,
            {"norm": "BatchNorm3d", "norm_args": {"momentum": 0.2}, "conv_bias": False},
        ),
        ("residual", False, {"stem_channels": 4, "dropout": 0.1}),
        ("residual", True, {"nonlin": "GELU", "kernel_sizes": [1, 3, [3, 5, 3]]}),
        # deeper than the plans, with a patch that its strides divide
        (
            "plain",
            False,
            {
                "features_per_stage": [2, 3, 4, 4],
                "kernel_sizes": [3, 3, 3, 3],
                "strides": [1, 2, 2, 2],
                "blocks_per_stage": [1, 1, 1, 1],
                "convs_per_stage_decoder": [1, 1, 1],
            },
        ),
    ],
)
def test_a_folder_is_read_back_as_a_teacher(tmp_path, encoder, old, arguments):
    plans = make_plans(encoder, old) | {"transpose_forward": [2, 0, 1]}
    axes = {"axes": [0, 2, 1]}
    teacher = write_results(tmp_path / "a", plan_arguments(encoder) | axes, plans)
    (teacher / nnunet_export.FINGERPRINT).write_text('{"spacings": []}')
    checkpoint, network = student_of(nnunet.read_results(teacher), **arguments)
    folder = nnunet_export.write(tmp_path / "b", checkpoint, network, None)
    parts = "Dataset900_Test/nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert folder == tmp_path / "b" / parts
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
    jsons = ["dataset.json", "dataset_fingerprint.json", "plans.json"]
    assert files == [*jsons[:2], "fold_0/checkpoint_final.pth", jsons[2]]
    found = nnunet.read_results(folder)
    before = nnunet.read_results(teacher)
    assert found.preprocessing == before.preprocessing and found.classes == before.classes
    assert found.patch_size == (16, 32, 24)
    written = json.loads((folder / "plans.json").read_text())
    plan = written["configurations"]["3d_fullres"]
    assert plan["patch_size"] == [16, 24, 32] and not nnunet_export.OLD_KEYS & plan.keys()
    others = written["configurations"].keys() - {"3d_fullres"}
    assert all(written["configurations"][k] == plans["configurations"][k] for k in others)
    mirrored = nnunet.load_fold(found, "0")[1]
    assert mirrored == (0, 1, 2)
    image = torch.randn(1, 1, 16, 32, 24)
    with torch.inference_mode():
        read = NnUNetTeacher([nnunet_export.read_back(folder)], [0, 1, 2], mirrored)(image)
        assert read.std() > 1e-3
        torch.testing.assert_close(read, network(image), rtol=0, atol=1e-6)


def test_classes_regions_and_mirrors(tmp_path):
    """Of the run, not of the teacher, whose classes may stand in another order."""
    labels = {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}
    teacher = write_results(tmp_path / "a", plan_arguments(), labels=labels)
    told = json.loads((teacher / "dataset.json").read_text())
    told |= {"training": [{"image": "patient_x"}], "name": "Livers"}
    (teacher / "dataset.json").write_text(json.dumps(told))
    results = nnunet.read_results(teacher)

    def written(name, **dataset):
        checkpoint, network = student_of(results, dataset)
        folder = nnunet_export.write(tmp_path / name, checkpoint, network, None)
        described = (folder / "dataset.json").read_text()
        assert "patient_x" not in described and "case_a" not in described
        return json.loads(described), nnunet.read_results(folder)

    described, found = written("b", ignore_label=3, flip_prob=0.0)
    assert described["labels"] == labels and found.ignore == 3 and described["name"] == "Livers"
    assert described["numTraining"] == 2 and described["file_ending"] == ".nii.gz"
    assert nnunet.load_fold(found, "0")[1] == ()  # trained without mirrors
    # an id that nnU-Net refuses: it must be the next one
    assert "ignore" not in written("c", ignore_label=255)[0]["labels"]
    regions = {"core": (2,), "whole": (1, 2)}
    described, found = written("d", regions=regions, regions_class_order=(2, 1))
    assert described["labels"] == {"background": 0, "core": [2], "whole": [1, 2]}
    assert found.regions and list(found.classes) == ["core", "whole"]
    assert found.regions_class_order == (2, 1)


def test_students_that_nnunet_cannot_run_are_refused(tmp_path):
    teacher = write_results(tmp_path / "a", plan_arguments())
    results = nnunet.read_results(teacher)

    def refused(expected, checkpoint, network, plans=None, kind=ConfigError):
        with pytest.raises(kind, match=expected):
            nnunet_export.write(tmp_path / "b", checkpoint, network, plans)
        assert not (tmp_path / "b").exists()

    refused("a unet, which nnU-Net does not have; train one", *student_of(results, name="unet"))
    for change, expected in (
        ({"spacing": (2.0, 1.0, 1.0)}, r"way than this run did \(spacing: \[2.0, 1.0, 1.0\] inst"),
        ({"intensity": "zscore"}, r"\(intensity: zscore instead of nnunet\).*tools/new_config.py"),
        ({"orientation": "LPS"}, "orientation: LPS instead of"),
        ({"intensity_channels": ({"scheme": "CTNormalization", **CT, "std": 9},)}, "'std': 9"),
    ):
        refused(expected, *student_of(results, change))
    refused(r"the student's axes are \[0, 1, 2\]", *student_of(results, axes=[0, 1, 2]))
    masked = make_plans(channels=2, scheme="ZScoreNormalization")
    two = write_results(tmp_path / "c", plan_arguments(), masked, channels=("T1", "T2"))
    refused("channels: 1 instead of 2", *student_of(results), plans=two)
    checkpoint, network = student_of(results)
    for change, expected in (
        ({"teacher": "resunet"}, "names no results folder of an nnU-Net.*--plans FOLDER"),
        ({"teacher_checkpoint": "runs/best.pt"}, "names no results folder"),
        ({"teacher_checkpoint": "gone/a__b__c"}, "gone/a__b__c: .* is not here; say where"),
    ):
        other = checkpoint | {"config": checkpoint["config"] | change}
        refused(expected, other, network)
        assert nnunet_export.plans_folder(other, teacher) == teacher
    refused("TRAINER__PLANS__CONFIG", checkpoint, network, tmp_path, CheckpointError)
