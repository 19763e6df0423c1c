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
    assert deployment.main(["--int8", "--dice", "--out", "table.md", *common, path]) == 0
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
    assert "written to table.md" in printed
    assert printed.index("| unet <- resunet, kd | PyTorch") < printed.index("| OpenVINO | int8")
    assert "1 thread(s)" in printed and "onnxruntime " in printed and "openvino " in printed

    # Teacher and student, in one runtime that costs no export
    deployment.main(
        ["--runtimes", "pytorch", *common, "runs/tiny/supervised/resunet/seed0/best.pt", path]
    )
    rows = [
        line.split(" | ")[0]
        for line in capsys.readouterr().out.splitlines()
        if "| PyTorch |" in line
    ]
    # as each is there, then the table
    assert rows == ["| resunet, supervised", "| unet <- resunet, kd"] * 2


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
    deployment.main([*common, "--dice"])
    printed = capsys.readouterr()
    assert (
        "| - |\n" in printed.out
        and "note: no Dice of unet, supervised, PyTorch float32" in printed.err
    )
    deployment.main([*common, "--dice", "--data-root", "elsewhere"])
    assert "| - |\n" not in capsys.readouterr().out
    deployment.main([*common, "--data-root", "elsewhere"])
    printed = capsys.readouterr()
    assert "| - |\n" in printed.out and "note" not in printed.err


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch, capsys):
    make_workspace(tmp_path)
    train("--method", "supervised", "--student", "unet", "--opts", "max_steps=1", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    measured = []

    def peak(*arguments, **options):
        measured.append(1.0)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(deployment, "peak_memory", peak)
    ckpt = "runs/tiny/supervised/unet/seed0/best.pt"
    common = ["--runtimes", "pytorch", "--repeats", "3", "--threads", "1", "--out", "table.md"]
    assert deployment.main([*common, "--ckpt", ckpt, ckpt]) == 130
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| unet, supervised | PyTorch") == 1
    assert "Stopped by Ctrl-C: not all was measured." in text and "batch 1, one pass after" in text

    once, rounds = deployment.run_once, []

    def run_once(model, window):
        rounds.append(1)
        if len(rounds) == 9:  # in the third of the passes that take turns
            raise KeyboardInterrupt
        once(model, window)

    monkeypatch.setattr(deployment, "run_once", run_once)
    assert deployment.main([*common, "--ckpt", ckpt]) == 130
    assert "median of 2 interleaved passes" in (tmp_path / "table.md").read_text()
    assert "written to table.md" in capsys.readouterr().out
