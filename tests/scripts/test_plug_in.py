"""A new network, loss or data format takes one file and one registry line; no script changes."""

import torch
from torch import nn

import dataloaders
import losses
import networks
from dataloaders.msd import MSDDataset
from networks import SegOutput
from tests.scripts.conftest import train
from utils.checkpoint import load_checkpoint


class OneConvolution(nn.Module):
    """The smallest student there can be."""

    stride = 1

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.feature_channels = {"decoder": in_channels}
        self.conv = nn.Conv3d(in_channels, num_classes, 3, padding=1)

    def forward(self, image, return_features=False):
        logits = self.conv(image)
        return SegOutput(logits, {"decoder": image}) if return_features else logits


class LogitMatching(nn.Module):
    """Mean squared difference of logits."""

    def __init__(
        self,
        student_channels,
        teacher_channels,
        num_classes,
        multilabel=False,
        preset="clean",
        weight=1.0,
    ):
        super().__init__()
        self.weight = weight

    def forward(self, student, teacher, label, progress):
        return {"match": self.weight * (student.logits - teacher.logits.detach()).square().mean()}


class InvertedDataset(MSDDataset):
    """The same scans with dark and bright exchanged."""

    def preprocess(self, case):
        sample = super().preprocess(case)
        return sample | {"image": 1.0 - sample["image"]}


def test_registry_lines_are_enough(workspace, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "one_convolution", OneConvolution)
    monkeypatch.setitem(losses.KD_METHODS, "logit_matching", LogitMatching)
    monkeypatch.setitem(dataloaders.DATASETS, "inverted", InvertedDataset)
    options = ("--opts", "format=inverted", "method_args={logit_matching: {weight: 2.0}}")
    train("--method", "supervised", "--student", "resunet", *options, cwd=workspace)
    train("--student", "one_convolution", "--method", "logit_matching", *options, cwd=workspace)
    state = load_checkpoint(
        workspace / "runs/tiny/logit_matching/resunet-one_convolution/seed0/last.pt"
    )
    assert state["step"] == 4
    assert state["network"]["name"] == "one_convolution"
    assert state["dataset"]["format"] == "inverted"
    assert torch.isfinite(state["weights"]["conv.weight"]).all()
