"""The deployment table: a row for each network, runtime and precision, and what a missing data set leaves out."""

import pytest

from benchmarks import deployment
from tests.scripts.conftest import make_workspace, train


@pytest.mark.slow
def test_a_table_of_teacher_and_student(tmp_path, monkeypatch, capsys):
    make_workspace(tmp_path)
    train("--method", "supervised", "--student", "resunet", cwd=tmp_path)
    train("--method", "kd", cwd=tmp_path)
    runs = ["runs/tiny/supervised/resunet/seed0/best.pt", "runs/tiny/kd/resunet-unet/seed0/best.pt"]
    monkeypatch.chdir(tmp_path)
    arguments = ["--ckpt", *runs, "--int8", "--repeats", "1", "--threads", "1", "--out", "table.md"]
    assert deployment.main(arguments) == 0
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")][2:]
    assert [row[0].lstrip("| ") for row in rows] == ["resunet, supervised"] * 5 + ["unet <- resunet, kd"] * 5
    kinds = [("PyTorch", "float32"), ("ONNX Runtime", "float32"), ("ONNX Runtime", "int8"), ("OpenVINO", "float32"),
             ("OpenVINO", "int8")]  # fmt: skip
    assert [tuple(row[1:3]) for row in rows] == kinds * 2
    for network in (rows[:5], rows[5:]):
        assert len({tuple(row[3:5]) for row in network}) == 1  # parameters, multiply-adds
        assert network[0][5] == "-" and float(network[1][5]) > 0  # MB
        assert network[0][7] == "1.00"
        assert all(float(row[6]) > 0 and float(row[8]) > 0 for row in network)
        dice = [float(row[9].rstrip(" |")) for row in network]
        assert dice[0] == dice[1] == dice[3]
    printed = capsys.readouterr().out
    assert "1 thread(s)" in printed and "onnxruntime " in printed and "openvino " in printed


def test_without_data_there_is_no_dice(tmp_path, monkeypatch, capsys):
    make_workspace(tmp_path)
    train("--method", "supervised", "--student", "unet", "--opts", "max_steps=1", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    common = ["--ckpt", "runs/tiny/supervised/unet/seed0/best.pt", "--runtimes", "pytorch", "--repeats", "1"]
    deployment.main(common)
    printed = capsys.readouterr()
    assert "| - |\n" in printed.out and "note: no Dice of unet, supervised, PyTorch float32" in printed.err
    deployment.main([*common, "--data-root", "elsewhere"])
    assert "| - |\n" not in capsys.readouterr().out
