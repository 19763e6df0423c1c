"""Run folders as tools/report.py reads them: what was set, logged and, after a test, scored."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dataloaders.lists import patient_function
from metrics import FLAGS, PUBLISHED, SHOWN
from reporting import FLAG_COLUMNS, flag_columns, score_columns
from tools.tables import read_summary, run_title, scores
from utils.checkpoint import load_checkpoint, read_table
from utils.config import labelled_name, read_yaml
from utils.run import run_folder
from utils.runlog import read_log
from utils.statistics import case_means


class ReportError(ValueError):
    """Something that no report can be made of; the message names the file and the fix."""


# What a configuration is asked for, and its kind
KEYS = {
    **dict.fromkeys(("dataset", "method", "preset"), str),
    "seed": int,
    "patch_size": (list, tuple),
}
KEYS_DISTILLED = {"student": str, "teacher": str, "teacher_seed": int}


@dataclasses.dataclass
class Run:
    """A run folder: what was set, logged and, after a test, scored."""

    folder: Path
    config: dict
    name: str  # told apart from the others of the page
    cell: tuple[str, str]  # data set and what was trained: equal for seeds
    log: list[dict]
    summary: dict | None
    rows: list[dict]  # of each case and class: case, class, SHOWN (None: undefined), FLAGS
    suffix: str  # of the files of this test: '', '_last', ...
    space: str  # of the rows, where a test has several

    @property
    def unit(self) -> str:
        return (self.summary or {}).get("unit", "mm")

    @property
    def patient(self) -> Callable[[str], str]:
        """Case name -> patient: the sample of tests and intervals."""
        return patient_function(self.config.get("patient_pattern") or "")

    @property
    def distilled(self) -> bool:
        return "student" in self.config and self.config["method"] != "supervised"

    @property
    def test_command(self) -> str:
        script = "test_2d.py" if len(self.config["patch_size"]) == 2 else "test_3d.py"
        return f"python {script} --ckpt {self.folder / 'best.pt'}"

    @property
    def scores(self) -> dict:
        """Means and counts of the rows that are shown: of their space."""
        return scores(self.summary, self.space)

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(row["case"] for row in self.rows))

    @property
    def classes(self) -> list[str]:
        return list(dict.fromkeys(row["class"] for row in self.rows))

    def of_class(self, name: str) -> list[dict]:
        return [row for row in self.rows if row["class"] == name]

    def case_means(self, metric: str) -> dict[str, float | None]:
        return case_means({"": self.rows}, metric)[0][""]

    def class_dice(self) -> dict[str, float | None]:
        """Mean Dice of each class, and under 'dice' the mean over cases."""
        means = {name: mean(row["dice"] for row in self.of_class(name)) for name in self.classes}
        return {"dice": mean(self.case_means("dice").values()), **means}

    def teacher(self) -> "Run | None":
        """The teacher's run of a distilled one, where its own configuration has it."""
        if self.config.get("teacher_checkpoint"):
            return read_if_there(Path(self.config["teacher_checkpoint"]).parent, self.space)
        return self.supervised(self.config["teacher"], self.config["teacher_seed"])

    def alone(self) -> "Run | None":
        """The same student with the same seed and labels without a teacher, if it was trained."""
        return self.supervised(self.config["student"] + self._labels, self.config["seed"])

    def untaught(self) -> "Run | None":
        """Of a run with unlabelled scans, the same on its labels alone, if it was trained."""
        config = self.config
        if not config.get("unlabelled_batch"):
            return None
        networks = f"{config['teacher']}-{config['student']}{self._labels}"
        return self._beside(config["method"], networks, config["seed"], config["preset"])

    @property
    def _labels(self) -> str:
        """The end of the name of the networks, where the labels are not simply all."""
        labelled = self.config.get("labelled")
        return "" if labelled is None else f"-{labelled_name(labelled)}"

    def supervised(self, network: str, seed: int) -> "Run | None":
        """The supervised run of a network beside this one, if there is one."""
        return self._beside("supervised", network, seed, "clean")

    def _beside(self, method: str, networks: str, seed: int, preset: str) -> "Run | None":
        # Where this one lies now: runs_dir/<dataset>/<method>/<teacher>-<student>/seed<k>.
        runs_dir, dataset = str(self.folder.resolve() / "../../../.."), self.config["dataset"]
        folder = run_folder(runs_dir, dataset, method, networks, seed, preset, "")
        return read_if_there(folder, self.space)

    def agreement(self) -> float | None:
        """Dice with the teacher on unlabelled scans, of the tested checkpoint, else the last one
        that was measured.
        """
        if self.summary and "agreement" in self.summary:
            return self.summary["agreement"]
        lines = [line["dice"] for line in self.log if line["kind"] == "agreement"]
        return lines[-1] if lines else None

    def best_validation(self) -> dict | None:
        """Scores of the validation with the highest mean Dice."""
        lines = [figures_of(line) for line in self.log if line["kind"] == "val"]
        lines = [line for line in lines if line.get("dice") is not None]
        return max(lines, key=lambda line: line["dice"], default=None)


def read_run(folder: Path, space: str, suffix: str) -> Run:
    """The run in `folder`; ReportError if there is none."""
    if not folder.is_dir():
        raise ReportError(
            f"{folder}: no such folder; name one such as runs/btcv/acf_bckd/resunet-unet/seed0"
        )
    if (folder / "config.yaml").is_file():
        config = read_yaml(folder / "config.yaml")
    elif (folder / "best.pt").is_file():  # imported weights
        config = load_checkpoint(folder / "best.pt").get("config")
        config = config if isinstance(config, dict) else {}
    else:
        raise ReportError(
            f"{folder}: holds neither config.yaml nor best.pt; name a run's folder, with its seed"
        )
    check_config(config, folder)
    metrics, summary = folder / f"metrics{suffix}.csv", folder / f"summary{suffix}.json"
    if suffix and not metrics.is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("metrics*.csv"))) or "none"
        raise ReportError(
            f"{metrics}: no such scores; there are: {there}; --suffix is what follows 'metrics'"
        )
    tested = metrics.is_file() and summary.is_file()
    name = name_of(config)
    return Run(
        folder=folder,
        config=config,
        name=name,
        cell=(config["dataset"], name),
        log=log_of(folder / "log.jsonl"),
        summary=read_summary(summary) if tested else None,
        rows=read_rows(metrics, space) if tested else [],
        suffix=suffix,
        space=space,
    )


def log_of(path: Path) -> list[dict]:
    """The lines of a log, read once: a teacher's run is asked for by each of its students."""
    state = path.stat() if path.is_file() else None
    return _log_of(path.resolve(), state and (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=8)
def _log_of(path: Path, state: tuple[int, int] | None) -> list[dict]:
    return read_log(path)


def check_config(config: dict, folder: Path) -> None:
    """ReportError unless it is the configuration of a training script."""
    keys = KEYS | (KEYS_DISTILLED if "student" in config else {"network": str})
    wrong = [key for key, kind in keys.items() if not isinstance(config.get(key), kind)]
    if not isinstance(config.get("tag", ""), str):
        wrong.append("tag")
    if wrong:
        raise ReportError(
            f"{folder}: its configuration is damaged, or of no training script "
            f"({', '.join(wrong)} missing or wrong); restore config.yaml"
        )


def read_if_there(folder: Path, space: str) -> Run | None:
    return read_run(folder, space, "") if (folder / "config.yaml").is_file() else None


def name_of(config: dict) -> str:
    """Which network, taught how, under which tag."""
    described = {"method": config["method"], "preset": config["preset"]}
    if "student" not in config:
        described |= {"student": config["network"], "labelled": config["labelled"]}
    else:
        labelled, unlabelled = config.get("labelled"), config.get("unlabelled_batch")
        if labelled is not None or unlabelled:
            trained_on = {"labelled": labelled_name(labelled), "unlabelled": unlabelled}
            described["trained_on"] = trained_on
        taught = config["method"] != "supervised"
        described |= {
            "student": config["student"],
            "teacher": config["teacher"] if taught else None,
        }
    tag = f" [{config['tag']}]" if config.get("tag") else ""
    return (run_title(described) + tag).replace("<-", "←")


def read_rows(path: Path, space: str) -> list[dict]:
    """Rows of metrics.csv as test_3d.py (of one space) or reporting.py wrote it; an undefined
    value is None, as are those of a metric that the file does not have. All have the papers'.
    """
    header, *lines = read_table(path) or [[]]
    try:
        columns = score_columns(header)
    except ValueError as error:
        raise ReportError(f"{path}: {error}; test the run again") from error
    flags = flag_columns(header)
    missing = [name for name in ("case", "class") if name not in header]
    missing += [column for flag, column in FLAG_COLUMNS.items() if flag not in flags]
    if missing:
        raise ReportError(f"{path}: no column of {', '.join(missing)}; test the run again")
    if missing := [metric for metric in PUBLISHED if metric not in columns]:
        raise ReportError(f"{path}: no column of {', '.join(missing)}; test the run again")
    rows = []
    for number, values in enumerate(lines, 2):
        try:
            line = dict(zip(header, values, strict=True))
            if line.get("space", space) != space:
                continue
            row = {"case": line["case"], "class": line["class"]}
            row |= {key: known(line[columns[key]]) if key in columns else None for key in SHOWN}
            row |= {flag: int(line[flags[flag]]) for flag in FLAGS}
        except ValueError as error:
            raise ReportError(f"{path}: line {number}: {error}; test the run again") from error
        rows.append(row)
    return rows


def known(text: str) -> float | None:
    """A score; None if it is undefined. ValueError for anything else."""
    if text in ("", "nan"):
        return None
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no score")
    return value


def named(runs: list[Run]) -> list[Run]:
    """The runs under names of their own: the seed, data set and folder are added where needed."""
    for key, text in (("seed", ", seed {}"), ("dataset", ", {}"), ("folder", ", {}")):
        before = [run.name for run in runs]
        for run in runs:
            if before.count(run.name) > 1:
                run.name += text.format(run.config.get(key, run.folder))
    return runs


def teacher_validation(run: Run, teacher: Run | None) -> dict | None:
    """The teacher's Dice on the validation cases: from the run's own log, or the teacher's best
    step.
    """
    for line in run.log:
        if line["kind"] == "teacher":
            return figures_of(line)
    return teacher.best_validation() if teacher else None


def log_series(runs: list[Run], kind: str, factor: float = 1) -> dict[str, dict[str, list]]:
    """Figures of a kind of log lines: key -> run -> (updates done, factor * value); undefined
    values are left out.
    """
    series, lists = {}, {}
    for run in runs:
        for line in run.log:
            if line["kind"] != kind:
                continue
            step = line["step"] + 1
            for key, value in line.items():
                if value is not None and key not in ("step", "kind"):
                    if (key, run.name) not in lists:
                        lists[key, run.name] = series.setdefault(key, {})[run.name] = []
                    lists[key, run.name].append((step, factor * value))
    return series


def figures_of(line: Mapping) -> dict:
    """What a line of the log holds beside its step and kind."""
    return {key: value for key, value in line.items() if key not in ("step", "kind")}


def defined(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are defined; None if there are none."""
    found = defined(values)
    return statistics.fmean(found) if found else None
