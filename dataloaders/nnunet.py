"""nnU-Net v2 raw data sets, `DatasetXXX_Name`: channels in files of their own, ids by name, regions
that may overlap.

    dataset.json               channel_names {"0": "CT"}, labels {"background": 0, "liver": 1},
                               file_ending ".nii.gz"
    imagesTr/CASE_0000.nii.gz  channel 0 of a scan; CASE_0001.nii.gz is channel 1, ...
    labelsTr/CASE.nii.gz
    imagesTs/, labelsTs/       the test list, if there are labels
    imagesUn/                  scans without labels; those of imagesTr that have none count too
    splits_final.json          [{"train": [CASE, ...], "val": [CASE, ...]}, ...], one entry per
                               fold; nnU-Net writes it to its folder of preprocessed data: copy it
                               here to train on the same folds

As nnU-Net allows, dataset.json may list the files of training under "dataset": {CASE: {"images":
[...], "label": ...}}, in place of imagesTr and labelsTr; an entry without "label" is unlabelled.
Region-based labels, {"whole tumour": [1, 2, 3], "tumour core": [2, 3]} with
regions_class_order, are trained as classes that overlap, one sigmoid each; predictions are written
with the ids of regions_class_order, later ones over earlier. The label "ignore" is no class: its id
marks voxels that nobody labelled.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataloaders.cases import Case
from dataloaders.checks import check_inside
from dataloaders.faults import DataError, Finding, Report, gathering
from dataloaders.lists import find_scans, listed_file, read_classes, read_json, select
from dataloaders.msd import MSDDataset
from dataloaders.volumes import SUFFIXES, as_stored, channel_number, is_data

SPLITS = "splits_final.json"
OBJECT = "an object with 'channel_names' and 'labels'"


class NnUNetDataset(MSDDataset):
    """Cases of an nnU-Net v2 raw data set, preprocessed as MSDDataset's.

    regions: name -> label ids, if labels are region-based; class_names are then these names,
    without background.
    regions_class_order: the id that a prediction has for each region. fold: which entry of
    splits_final.json is used where split_dir is empty.
    """

    described_keys = (*MSDDataset.described_keys, "regions", "regions_class_order", "ignore_label")

    @classmethod
    def described(cls, root: Path, datalist: str, keys: Sequence[str]) -> dict:
        """Class names, channels, regions and the id `ignore`, as dataset.json says."""
        known = read_description(root / datalist)
        return {key: known[key] for key in keys}

    def __init__(
        self,
        root: str,
        datalist: str,
        class_names: Sequence[str],
        in_channels: int = 1,
        regions: dict[str, Sequence[int]] | None = None,
        regions_class_order: Sequence[int] = (),
        fold: int = 0,
        **preprocessing,
    ) -> None:
        self.regions = {name: tuple(ids) for name, ids in (regions or {}).items()}
        self.regions_class_order, self.fold = tuple(regions_class_order), fold
        self.multilabel = bool(self.regions)
        if self.regions and tuple(self.regions) != tuple(class_names):
            raise DataError(
                f"class_names: {list(class_names)}, but regions {list(self.regions)}; leave the "
                "former out"
            )
        if len(self.regions_class_order) != len(self.regions):
            raise DataError(
                f"regions_class_order: {list(regions_class_order)}, expected one id for each of "
                f"{list(self.regions)}"
            )
        wrong = _wrong_order(self.regions, self.regions_class_order)
        if wrong:
            raise DataError(f"regions_class_order: {wrong}")
        super().__init__(root, datalist, class_names, in_channels, **preprocessing)

    @property
    def allowed_ids(self) -> tuple[int, ...]:
        if not self.regions:
            return super().allowed_ids
        return tuple(sorted({0, *(k for ids in self.regions.values() for k in ids)}))

    def own_splits(self, report: Report | None = None) -> dict[str, list[Case]]:
        """Train and val of the fold of splits_final.json; test: what labelsTs holds."""
        path, sections = self.root / SPLITS, self.sections(report)
        tested = [case for case in sections["test"] if case.label]
        result = {"train": [], "val": [], "test": tested}
        if not path.is_file() and not self.needs_labels:  # nor anything to validate on
            return result | {"train": sections["training"]}
        if not path.is_file():
            raise DataError(
                Finding(
                    "list",
                    str(path),
                    "no such list of folds",
                    "",
                    "copy nnU-Net's there, or draw lists (tools/make_splits.py --format nnunet, "
                    "tools/new_config.py) and "
                    "set split_dir",
                )
            )
        folds = read_json(path, list, "a list of folds")
        if not 0 <= self.fold < len(folds):
            raise DataError(
                Finding(
                    "list",
                    str(path),
                    f"{len(folds)} folds, counted from 0",
                    "",
                    f"fold is {self.fold}, choose one of them",
                )
            )
        entry = folds[self.fold]
        for split in ("train", "val"):
            names = entry.get(split) if isinstance(entry, dict) else None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DataError(
                    Finding(
                        "list",
                        str(path),
                        f"fold {self.fold} has no list of case names '{split}'",
                        "",
                        "copy the file again",
                    )
                )
            repeated = sorted({name for name in names if names.count(name) > 1})
            with gathering(report) as faults:
                if repeated:
                    listed = f"'{split}' of fold {self.fold} names '{repeated[0]}' more than once"
                    faults.error("listed twice", path, listed, "", "each case may stand once")
                source = f"{path}, fold {self.fold}"
                known = sections["training"] + sections["unlabelled"]
                result[split] = select(known, list(dict.fromkeys(names)), source, faults)
        return result

    def encode_label(self, label: np.ndarray) -> np.ndarray:
        """Stored ids (1, H, W, D) -> regions (K, H, W, D) uint8 if labels are region-based."""
        if not self.regions:
            return label
        return np.stack([np.isin(label[0], ids) for ids in self.regions.values()]).astype(np.uint8)

    def decode_prediction(self, prediction: np.ndarray) -> np.ndarray:
        """Regions (K, H, W, D) -> ids (H, W, D) of regions_class_order, later regions over earlier
        ones.
        """
        if not self.regions:
            return prediction
        ids = np.zeros(prediction.shape[1:], np.uint8)
        for region, value in zip(prediction, self.regions_class_order):
            ids[np.asarray(region) > 0] = value
        return ids

    def channel_of(self, name: str) -> tuple[str, int] | None:
        """Every image file ends in the number of its channel, also where there is but one."""
        return channel_number(name)

    def structures(self) -> dict[str, tuple[int, ...]]:
        """A region is made of its own id and of those of the regions within it; of regions that
        overlap without one being within the other, the label map holds the overlap for the later
        one alone.
        """
        if not self.regions:
            return super().structures()
        pairs = list(zip(self.regions.values(), self.regions_class_order))
        return {
            name: tuple(sorted({value for other, value in pairs if set(other) <= set(ids)}))
            for name, ids in self.regions.items()
        }

    def id_names(self) -> dict[int, str]:
        if not self.regions:
            return super().id_names()
        # An id stands for its region without those that are painted over it.
        return {0: "background"} | {
            value: name if k + 1 == len(self.regions) else f"{name}, the rest of it"
            for k, (name, value) in enumerate(zip(self.regions, self.regions_class_order))
        }

    def id_titles(self) -> dict[int, str]:
        if not self.regions:
            return super().id_titles()
        return {k: f"id {k}" for k in self.allowed_ids if k}

    def present(self, ids: Sequence[int]) -> set[int]:
        return {k - 1 for k in ids} if self.regions else super().present(ids)

    def own_test(self) -> list[Case]:
        return [case for case in self.sections(None)["test"] if case.label]

    def sections(self, report: Report | None) -> dict[str, list[Case]]:
        """Cases of imagesTr as training, or those of the list `dataset`; of imagesTs with labels as
        test; those without of imagesTr and imagesUn as unlabelled, sorted by name.
        """
        path = self.root / self.datalist
        content = read_json(path, expected=OBJECT)
        ending = _ending(path, content)
        listed = content.get("dataset")
        result: dict[str, list[Case]] = {"training": [], "test": [], "unlabelled": []}
        with gathering(report) as report:
            if listed is None:
                result["training"] = self._with_label("Tr", ending, report)
                result["unlabelled"] = self._without_label("Tr", ending, report)
                if self.needs_labels and not self._files("labelsTr", ending):
                    report.error(
                        "empty list",
                        self.root / "labelsTr",
                        f"no *{ending} files",
                        "one for each labelled scan",
                        "complete the data",
                    )
            else:
                result["training"] = self._of_list(listed, path, report)
            result["test"] = self._with_label("Ts", ending, report)
            result["unlabelled"] += self._without_label("Un", ending, report)
            if self.unlabelled == "test":
                result["test"] += self._without_label("Ts", ending, report)
        # a list may name scans of these folders too
        used = {image.absolute() for case in result["training"] for image in case.images}
        for section in ("test", "unlabelled"):
            others = [c for c in result[section] if used.isdisjoint(p.absolute() for p in c.images)]
            result[section] = others
        return result

    def _of_list(self, listed: dict, source: Path, report: Report) -> list[Case]:
        """The cases that dataset.json lists under `dataset`."""
        if not isinstance(listed, dict):
            found = f"'dataset' is {type(listed).__name__}"
            expected = "an object of case names with 'images' and 'label'"
            raise DataError(Finding("list", str(source), found, expected, "mend the data list"))
        cases = []
        for name, entry in sorted(listed.items()):
            with report.catching():
                case, outside = self._listed(source, name, entry, report), self.allow_outside
                inside = [check_inside(f, self.root, source, report, outside) for f in case.files]
                if all(inside):
                    cases.append(case)
        if not listed:
            report.error("empty list", source, "'dataset' names no case", "at least one", "fill it")
        return cases

    def _with_label(self, part: str, ending: str, report: Report) -> list[Case]:
        """The scans of a folder, of those that have a label."""
        cases = []
        for label in self._files(f"labels{part}", ending):
            with report.catching():
                cases.append(self._case(label, label.name[: -len(ending)], part, ending))
        return cases

    def _without_label(self, part: str, ending: str, report: Report) -> list[Case]:
        """The scans of a folder, of those that have no label; a fault for each of them that lacks a
        channel.
        """
        folder, labels = self.root / f"images{part}", self.root / f"labels{part}"
        if not self._files(folder.name, ending):
            return []

        def labelled(name: str) -> bool:  # `_with_label` says what such a scan lacks
            return as_stored(labels / f"{name}{ending}").is_file()

        cases, problems = find_scans(folder, self.in_channels, self.channel_of)
        report.take(problem for problem in problems if not labelled(problem.case))
        return [case for case in cases if not labelled(case.name)]

    def _files(self, folder: str, ending: str) -> list[Path]:
        return sorted(filter(is_data, (self.root / folder).glob(f"*{ending}")))

    def _case(self, label: Path, name: str, part: str, ending: str) -> Case:
        folder = self.root / f"images{part}"
        images = tuple(
            as_stored(folder / f"{name}_{k:04d}{ending}") for k in range(self.in_channels)
        )
        missing = [path for path in images if not path.is_file()]
        if missing:
            whole = (folder / f"{name}{ending}").is_file()
            raise DataError(
                Finding(
                    "missing file",
                    str(missing[0]),
                    f"no such file, expected for {label.relative_to(self.root)}",
                    "",
                    "its name lacks the channel, rename it"
                    if whole
                    else "restore it or remove the label",
                )
            )
        return Case(name, images, label)

    def _listed(self, path: Path, name: str, entry: object, report: Report) -> Case:
        images, label = (
            (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        )
        if (
            not isinstance(images, list)
            or len(images) != self.in_channels
            or not all(isinstance(image, str) for image in images)
            or not isinstance(label, (str, type(None)))
        ):
            raise DataError(
                Finding(
                    "list",
                    str(path),
                    f"case '{name}' is {entry!r}",
                    f"'images', a list of {self.in_channels}, and 'label'",
                    "mend the data list",
                )
            )
        files = tuple(listed_file(path, self.root, image, report) for image in images)
        own = listed_file(path, self.root, label, report) if label else None
        return Case(name, files, own, classes=read_classes(entry, path, name))

    def _ids(self, label: np.ndarray) -> list[int]:
        """Of regions: the numbers, counted from 1, of those that occur."""
        if not self.regions:
            return super()._ids(label)
        return [k + 1 for k, region in enumerate(label) if (region == 1).any()]

    def _parameters(self) -> dict:
        return super()._parameters() | {"regions": [list(ids) for ids in self.regions.values()]}


def read_description(path: Path) -> dict:
    """class_names, in_channels, regions and regions_class_order of an nnU-Net v2 dataset.json."""
    content = read_json(path, expected=OBJECT)
    channels, labels = content.get("channel_names"), content.get("labels")
    if "modality" in content and channels is None:
        raise DataError(
            f"{path}: in the style of nnU-Net v1 and the decathlon ('modality', labels by id); if "
            "its image files have "
            "no channel number (_0000) set format: msd, otherwise convert it "
            "(nnUNetv2_convert_old_nnUNet_dataset)"
        )
    if not isinstance(channels, dict) or sorted(channels) != sorted(map(str, range(len(channels)))):
        raise DataError(
            f"{path}: 'channel_names' is {channels!r}, "
            'expected {"0": "CT"} or more, counted from 0'
        )
    _ending(path, content)
    if not isinstance(labels, dict) or len(labels) < 2:
        raise DataError(
            f'{path}: \'labels\' is {labels!r}, expected {{"background": 0, "liver": 1}} or more'
        )
    if labels.get("background", 0) not in (0, [0]):
        raise DataError(
            f"{path}: 'labels' has the background as {labels['background']!r}, expected 0"
        )
    wrong = {
        name: ids
        for name, ids in labels.items()
        if not all(
            type(k) is int and 0 <= k < 256 for k in (ids if isinstance(ids, list) else [ids])
        )
        or ids == []
    }
    if wrong:
        swapped = all(str(name).isdecimal() for name in labels)
        fix = "; names and ids are swapped, as in nnU-Net v1" if swapped else ""
        raise DataError(
            f"{path}: 'labels' has {wrong}, expected an id 0..255 or a list of ids for each "
            f"name{fix}"
        )
    known = {"in_channels": len(channels)} | _ignored(path, labels)
    labels = {name: ids for name, ids in labels.items() if name != "ignore"}
    if any(isinstance(ids, list) for ids in labels.values()):
        return known | _regions(path, labels, content.get("regions_class_order"))
    names = {k: name for name, k in labels.items()}
    if sorted(labels.values()) != list(range(len(labels))):
        raise DataError(
            f"{path}: 'labels' has the ids {sorted(labels.values())}, expected 0 (background) to "
            f"{len(labels) - 1}, "
            f"each once; nnU-Net refuses others too"
        )
    return known | {
        "class_names": tuple(names[k] for k in range(len(names))),
        "regions": {},
        "regions_class_order": (),
    }


def _ignored(path: Path, labels: dict) -> dict:
    """The id of voxels that nobody labelled, as `ignore_label`; None where there is none."""
    ignore = labels.get("ignore")
    if ignore is None:
        return {"ignore_label": None}
    others = {name: ids for name, ids in labels.items() if name != "ignore"}
    owners = [
        name for name, ids in others.items() if ignore in (ids if isinstance(ids, list) else [ids])
    ]
    if isinstance(ignore, list) or owners:
        also = f", which is also '{owners[0]}'" if owners else ""
        raise DataError(
            f"{path}: 'labels' has 'ignore': {ignore!r}{also}; expected one id of no class, for "
            "voxels that nobody labelled"
        )
    return {"ignore_label": ignore}


def _regions(path: Path, labels: dict, order: object) -> dict:
    regions = {name: ids if isinstance(ids, list) else [ids] for name, ids in labels.items()}
    regions = {name: ids for name, ids in regions.items() if set(ids) != {0}}
    inside = [name for name, ids in regions.items() if 0 in ids]
    if inside:
        raise DataError(
            f"{path}: region '{inside[0]}' holds the id 0, which is background; take it out"
        )
    if (
        not isinstance(order, list)
        or len(order) != len(regions)
        or not all(type(k) is int and k > 0 for k in order)
    ):
        raise DataError(
            f"{path}: 'regions_class_order' is {order!r}, expected one id above 0 for each of "
            f"{', '.join(regions)}, in "
            f"the order in which they are painted over each other"
        )
    wrong = _wrong_order(regions, order)
    if wrong:
        raise DataError(f"{path}: 'regions_class_order': {wrong}")
    return {"class_names": tuple(regions), "regions": regions, "regions_class_order": tuple(order)}


def _wrong_order(regions: dict[str, Sequence[int]], order: Sequence[int]) -> str:
    """What is wrong with the ids by which regions are painted; '' if nothing is.

    An id is one of its region's, or one that no label has (predictions then have ids of their
    own); that of another region would mean something else in predictions than in labels.
    """
    if any(not 0 < k < 256 for k in order) or len(set(order)) < len(order):
        return f"is {list(order)}, expected an id of its own for each region, of 1 to 255"
    known = {k for ids in regions.values() for k in ids}
    for (name, ids), k in zip(regions.items(), order):
        if k in known and k not in ids:
            return (
                f"paints '{name}' with {k}, which labels have elsewhere; expected one of its own "
                f"ids, {sorted(ids)}, or one that no label has"
            )
    return ""


def _ending(path: Path, content: dict) -> str:
    ending = content.get("file_ending")
    if ending not in SUFFIXES:
        raise DataError(
            f"{path}: 'file_ending' is {ending!r}, expected one of {', '.join(SUFFIXES)}; 3D scans "
            "alone can be read"
        )
    return ending
