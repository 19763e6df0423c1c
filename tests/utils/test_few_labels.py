"""What the few-label scripts share: who reads the data first."""

import contextlib
from types import SimpleNamespace

import pytest

from utils import few_labels


@pytest.mark.parametrize("caches", [True, False])
def test_one_process_fills_a_cache_and_memory_is_filled_by_all(monkeypatch, caches):
    events = []

    @contextlib.contextmanager
    def main_first():
        events.append("first")
        yield
        events.append("others")

    dataset = SimpleNamespace(
        caches=caches,
        incomplete=False,
        splits=lambda labelled, report: {"labelled": [1], "unlabelled": [2], "val": [3]},
        prepare=lambda splits, report, chosen: events.append("prepare"),
    )
    monkeypatch.setattr(few_labels, "build_dataset", lambda **arguments: dataset)
    cfg = SimpleNamespace(
        labelled=None, select_on="val", method="crkd", dataset_arguments=lambda: {}
    )
    run = SimpleNamespace(
        world=SimpleNamespace(main_first=main_first), open=lambda report: events.append("open")
    )
    few_labels.open_data(cfg, SimpleNamespace(config="x", allow_outside=False), run)
    opened = ["first", "open", "others"]
    assert events == (["first", "prepare", "others"] if caches else ["prepare"]) + opened
