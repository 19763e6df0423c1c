"""The benchmark of whole-volume prediction runs at its smallest size, and its peers predict what
ours predicts.
"""

import re

import pytest
import torch

from benchmarks import inference_speed
from inference import predict_logits
from networks import build_network

ARGUMENTS = ["--small", "--repeats", "1", "--threads", "1", "--train-steps", "1"]


@pytest.mark.parametrize("part, rows, clock", [("unet", 5, ["--cpu-time"]), ("vnet", 4, [])])
def test_small_run_prints_a_row_per_figure(tmp_path, capsys, part, rows, clock):
    out = tmp_path / "table.md"
    assert inference_speed.main([*ARGUMENTS, "--parts", part, "--out", str(out), *clock]) == 0
    text = out.read_text()
    assert text in capsys.readouterr().out
    assert len(re.findall(rf"^\| {part}, ", text, re.MULTILINE)) == rows


def test_the_protocol_of_the_left_atrium_has_54_windows():
    task, seen = inference_speed.TASKS["vnet"], []

    class Counter(torch.nn.Module):
        def forward(self, window):
            seen.append(tuple(window.shape[2:]))
            return window.expand(-1, 2, -1, -1, -1)

    inference_speed.window_by_window(Counter(), torch.zeros(1, *task.size), task)
    assert seen == [task.patch_size] * 54


def test_the_peers_average_like_ours():
    tasks = inference_speed.SMALL
    image, _ = inference_speed.make_case(tasks["unet"], 0)
    network = build_network("unet", 1, 14, channels=(4, 8, 8, 8)).eval()
    found = predict_logits(network, image, patch_size=tasks["unet"].patch_size)
    torch.testing.assert_close(
        found, inference_speed.monai_logits(network, image, tasks["unet"]), rtol=1e-5, atol=1e-5
    )
    image, _ = inference_speed.make_case(tasks["vnet"], 0)
    network = build_network("vnet", 1, 2, n_filters=2).eval()
    task = tasks["vnet"]
    probs = predict_logits(
        network, image, patch_size=task.patch_size, stride=task.stride, probabilities=True
    )
    certain = (probs[0] - probs[1]).abs() > 1e-5
    labels = inference_speed.window_by_window(network, image, task)
    assert (
        torch.equal(labels[certain], probs.argmax(0)[certain].to(torch.uint8))
        and certain.float().mean() > 0.99
    )
