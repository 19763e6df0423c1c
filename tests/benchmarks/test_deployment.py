"""The deployment table: a row for each network, runtime and precision, and what a missing data set
leaves out.
"""

import pytest

from benchmarks import deployment
from tests.scripts.conftest import make_workspace, train


@pytest.mark.slow
def test_the_table_of_a_student(tmp_path, monkeypatch, capsys):
    make_workspace(tmp_path)
    train("--method", "supervised", "--student", "resunet", cwd=tmp_path)
    train("--method", "kd", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    measure = deployment.peak_memory

    # a process for each row would take most of this test's time
    def in_one_process(make, *arguments, **options):
        return measure(make, *arguments, **options) if make.args[0].name == "model.onnx" else 1.0

    monkeypatch.setattr(deployment, "peak_memory", in_one_process)
    common = ["--repeats", "1", "--threads", "1", "--ckpt"]
    path = "runs/tiny/kd/resunet-unet/seed0/best.pt"
    assert deployment.main(["--int8", "--out", "table.md", *common, path]) == 0
    rows = [
        line.split(" | ")
        for line in (tmp_path / "table.md").read_text().splitlines()
        if line.startswith("|")
    ][2:]
    assert [row[0].lstrip("| ") for row in rows] == ["unet <- resunet, kd"] * 5
    assert [tuple(row[1:3]) for row in rows] == [
        ("PyTorch", "float32"),
        ("ONNX Runtime", "float32"),
        ("ONNX Runtime", "int8"),
        ("OpenVINO", "float32"),
        ("OpenVINO", "int8"),
    ]
    assert len({tuple(row[3:5]) for row in rows}) == 1  # parameters, multiply-adds
    assert rows[0][5] == "-" and float(rows[1][5]) > 0  # MB
    assert rows[0][7] == "1.00"
    assert all(float(row[6]) > 0 for row in rows)
    assert [row[8] for row in rows if row[1:3] != ["ONNX Runtime", "float32"]] == ["1"] * 4
    assert 5 < float(rows[1][8]) < 1000
    dice = [float(row[9].rstrip(" |")) for row in rows]
    assert dice[0] == dice[1] == dice[3]
    printed = capsys.readouterr().out
    assert "1 thread(s)" in printed and "onnxruntime " in printed and "openvino " in printed

    # Teacher and student, in one runtime that costs no export
    deployment.main(
        [
            "--runtimes",
            "pytorch",
            "--no-dice",
            *common,
            "runs/tiny/supervised/resunet/seed0/best.pt",
            path,
        ]
    )
    rows = [
        line.split(" | ")[0]
        for line in capsys.readouterr().out.splitlines()
        if "| PyTorch |" in line
    ]
    assert rows == ["| resunet, supervised", "| unet <- resunet, kd"]


def test_without_data_there_is_no_dice(tmp_path, monkeypatch, capsys):
    make_workspace(tmp_path)
    train("--method", "supervised", "--student", "unet", "--opts", "max_steps=1", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deployment, "peak_memory", lambda *_, **__: 1.0)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    common = [
        "--ckpt",
        "runs/tiny/supervised/unet/seed0/best.pt",
        "--runtimes",
        "pytorch",
        "--repeats",
        "1",
    ]
    deployment.main(common)
    printed = capsys.readouterr()
    assert (
        "| - |\n" in printed.out
        and "note: no Dice of unet, supervised, PyTorch float32" in printed.err
    )
    deployment.main([*common, "--data-root", "elsewhere"])
    assert "| - |\n" not in capsys.readouterr().out
