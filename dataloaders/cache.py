"""Preprocessed cases on disk: made once, then memory-mapped, so that a second start is fast and a
step reads little.

The key of an entry covers the content of the case's files and every parameter of the deterministic
transforms.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dataloaders.cases import Case, file_digest

FORMAT = 3  # raise when the stored layout or the meaning of a transform changes


class CaseCache:
    """Preprocessed samples of cases under `folder`. `preprocess(case)` -> dict of arrays and JSON
    values.
    """

    def __init__(
        self, folder: Path, preprocess: Callable[[Case], dict], parameters: Mapping
    ) -> None:
        self.folder, self.preprocess = folder, preprocess
        self.parameters = json.dumps({"format": FORMAT, **parameters}, sort_keys=True)
        self._digests_path = folder / "digests.json"
        self._digests: dict[str, list] = {}
        if self._digests_path.is_file():
            # Only a memory of digests: where it is damaged, the files are read again.
            with contextlib.suppress(ValueError):
                known = json.loads(self._digests_path.read_text(encoding="utf-8"))
                self._digests = known if isinstance(known, dict) else {}

    def forget_digests(self) -> None:
        """Read every file anew, rather than trust its size and time of modification."""
        self._digests = {}

    def facts(self, case: Case, store: bool = True) -> dict:
        """The JSON values of the preprocessed sample and the `shape` of its image; made first where
        they are not there.

        store: keep the sample. DataError that lists all faults of the case.
        """
        # else preprocessing says what is missing, and what else is wrong
        there = all(path.exists() for path in case.files)
        if there and store and not self._entry(case).is_dir():
            self._make(case)
        sample = self.read(case) if there and self._entry(case).is_dir() else self.preprocess(case)
        large = [key for key, value in sample.items() if _is_array(key, value)]
        shape = tuple(sample["image"].shape[1:])
        return {key: value for key, value in sample.items() if key not in large} | {"shape": shape}

    def read(self, case: Case) -> dict:
        """The preprocessed sample; arrays are memory-mapped and read-only."""
        entry = self._entry(case)
        if not entry.is_dir():
            self._make(case)
        sample = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        for path in entry.glob("*.npy"):
            sample[path.stem] = np.load(path, mmap_mode="r")
        return sample

    def _image_digest(self, case: Case) -> str:
        return "-".join(file_digest(path, self._digests) for path in case.images)

    def _entry(self, case: Case) -> Path:
        digests = [self._image_digest(case)]
        if case.label is not None:
            digests.append(file_digest(case.label, self._digests))
        key = hashlib.sha256("\n".join([self.parameters, *digests]).encode()).hexdigest()
        return self.folder / f"{case.name}-{key[:16]}"

    def _make(self, case: Case) -> None:
        sample = self.preprocess(case)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".making-{case.name}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            meta = {}
            for key, value in sample.items():
                if _is_array(key, value):
                    np.save(temporary / f"{key}.npy", value)
                else:
                    meta[key] = value.tolist() if isinstance(value, np.ndarray) else value
            (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            try:
                os.rename(temporary, self._entry(case))
            except OSError:
                # if it is there, another process made the same entry meanwhile
                if not self._entry(case).is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def write_digests(self) -> None:
        if self._digests:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self._digests_path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self._digests), encoding="utf-8")
            os.replace(temporary, self._digests_path)


def _is_array(key: str, value: object) -> bool:
    """Whether a value has a file of its own; the others are in meta.json."""
    return (
        isinstance(value, np.ndarray) and value.ndim >= 1 and key not in ("affine", "native_affine")
    )
