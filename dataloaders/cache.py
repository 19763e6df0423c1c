"""Preprocessed cases on disk: made once, then memory-mapped, so that a second start is fast and a
step reads little.

The key of an entry covers the content of the case's files and every parameter of the deterministic
transforms, and each start reads the files to know their content. An entry has the checksums of its
own files; each process compares them when it first reads the entry, and makes a damaged one again.
"""

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dataloaders.cases import Case, file_digest
from utils.checkpoint import DiskError, Lock, unused_name, writing

FORMAT = 3  # raise when the stored layout or the meaning of a transform changes
META, CHECKSUMS = "meta.json", "checksums.json"
MAKING = ".making-"  # begins the names of what is not complete, or no longer wanted
LOCK = ".lock"  # shared by those who make entries
TRIES = 3  # other processes may replace an entry while it is read
CHUNK = 2**20  # bytes


class DamagedEntry(Exception):
    """An entry that is not what was written; the message says what of it."""


class CaseCache:
    """Preprocessed samples of cases under `folder`. `preprocess(case)` -> dict of arrays and JSON
    values.

    A folder that cannot be written serves what it has. Several processes, of several machines too,
    may fill one.
    """

    def __init__(
        self, folder: Path, preprocess: Callable[[Case], dict], parameters: Mapping
    ) -> None:
        self.folder, self.preprocess = folder, preprocess
        self.parameters = json.dumps({"format": FORMAT, **parameters}, sort_keys=True)
        self._digests: dict[str, list] = {}  # of files that this process has read
        self._sound: set[Path] = set()  # entries whose checksums it has compared

    def facts(self, case: Case, store: bool = True) -> dict:
        """The JSON values of the preprocessed sample and the `shape` of its image; made first where
        they are not there.

        store: keep the sample. DataError that lists all faults of the case.
        """
        # else preprocessing says what is missing, and what else is wrong
        there = all(path.exists() for path in case.files)
        if there and (store or self._entry(case).is_dir()):
            sample = self.read(case)
        else:
            sample = self.preprocess(case)
        large = [key for key, value in sample.items() if _is_array(key, value)]
        shape = tuple(sample["image"].shape[1:])
        return {key: value for key, value in sample.items() if key not in large} | {"shape": shape}

    def read(self, case: Case) -> dict:
        """The preprocessed sample; arrays are memory-mapped and read-only. DiskError if it is not
        there and cannot be written.
        """
        entry = self._entry(case)
        for _ in range(TRIES):
            try:
                return self._load(entry)
            except FileNotFoundError:
                self._make(case, entry)
            except DamagedEntry as damage:
                print(f"warning: {entry}: damaged ({damage}), made again", file=sys.stderr)
                self._make(case, entry, replace=True)
        return self._load(entry)

    def sweep(self) -> None:
        """Remove what processes left that were killed while they made an entry."""
        leftovers = list(self.folder.glob(f"{MAKING}*"))
        if not leftovers:
            return
        lock = Lock(self.folder / LOCK)
        try:
            # someone makes an entry, or nothing tells whether someone does
            if lock.take() is not None or not lock.works:
                return
        except OSError:  # not ours to clean
            return
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)
        lock.release()

    def _load(self, entry: Path) -> dict:
        """FileNotFoundError if there is no entry, DamagedEntry if it is not as it was written."""
        if entry not in self._sound:
            _compare(entry)
            self._sound.add(entry)
        sample = json.loads((entry / META).read_text(encoding="utf-8"))
        for path in entry.glob("*.npy"):
            sample[path.stem] = np.load(path, mmap_mode="r")
        return sample

    def _entry(self, case: Case) -> Path:
        digests = ["-".join(file_digest(path, self._digests) for path in case.images)]
        if case.label is not None:
            digests.append(file_digest(case.label, self._digests))
        key = hashlib.sha256("\n".join([self.parameters, *digests]).encode()).hexdigest()
        return self.folder / f"{case.name}-{key[:16]}"

    def _make(self, case: Case, entry: Path, replace: bool = False) -> None:
        """replace: what stands at `entry`. DiskError if the folder cannot be written."""
        sample = self.preprocess(case)
        self._sound.discard(entry)
        try:
            with writing(entry):
                self._write(sample, entry, replace)
        except DiskError as error:
            raise DiskError(
                f"{error}; make room or mend the folder, or name another: --opts cache_dir=FOLDER "
                "in training, --cache-dir FOLDER in a test"
            ) from error

    def _write(self, sample: dict, entry: Path, replace: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.folder / LOCK)
        lock.take(shared=True, wait=True)
        temporary = unused_name(self.folder, MAKING)
        damaged = unused_name(self.folder, MAKING)
        try:
            temporary.mkdir()
            meta = {}
            for key, value in sample.items():
                if _is_array(key, value):
                    np.save(temporary / f"{key}.npy", value)
                else:
                    meta[key] = value.tolist() if isinstance(value, np.ndarray) else value
            (temporary / META).write_text(json.dumps(meta), encoding="utf-8")
            checksums = {path.name: _checksum(path) for path in temporary.iterdir()}
            (temporary / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
            if replace and entry.exists():
                os.rename(entry, damaged)
            try:
                os.rename(temporary, entry)
            except OSError:
                # if it is there, another process made the same entry meanwhile
                if not entry.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(damaged, ignore_errors=True)
            lock.release()


def _compare(entry: Path) -> None:
    """FileNotFoundError if there is no entry, DamagedEntry if a file of it is not as it was
    written.
    """
    if not entry.exists():
        raise FileNotFoundError(entry)
    try:
        checksums = json.loads((entry / CHECKSUMS).read_text(encoding="utf-8"))
        if not isinstance(checksums, dict) or META not in checksums:
            raise DamagedEntry(f"{CHECKSUMS} is not as it was written")
        for name, checksum in checksums.items():
            if _checksum(entry / name) != checksum:
                raise DamagedEntry(f"{name} is not as it was written")
    except (OSError, ValueError) as error:
        raise DamagedEntry(str(error)) from error


def _checksum(path: Path) -> int:
    """CRC-32 of a file, which is read in pieces: memory-mapped, it would count as memory in use."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _is_array(key: str, value: object) -> bool:
    """Whether a value has a file of its own; the others are in META."""
    return (
        isinstance(value, np.ndarray) and value.ndim >= 1 and key not in ("affine", "native_affine")
    )
