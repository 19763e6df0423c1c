"""Write requirements-lock.txt, the exact version of every package that the requirement files bring
in, or check by it.

    python tools/lock.py  # ask pip what it would install, and write the file
    python tools/lock.py --check  # ask again, under the lock: the same versions and archives?
    # the same for what pip has just installed (pip install --report)
    python tools/lock.py --verify REPORT.json

scripts/setup.sh installs with the lock as constraints (pip -c) and verifies what pip reports. The
lock has the SHA-256 of each archive that was chosen on the machine that wrote it (Linux, x86-64,
Python 3.11). Elsewhere pip may choose another archive of the same version, whose hash is not known
here, and packages that only that system needs (CUDA libraries, colorama): these are noted. Another
version, or an archive of the same name with another hash, is an error. PyTorch has a version but no
hash: its archive depends on the CUDA or CPU build.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-lock.txt"
HEADER = """\
# Written by tools/lock.py: every package that the requirement files bring in. Not to be edited; \
write it anew after a
# change of a requirement file. scripts/setup.sh passes it to pip as constraints (-c) and verifies \
the archives by it.
"""
BUILDS = ("torch",)  # archives that differ between indexes


class Locked(NamedTuple):
    version: str
    archive: str = ""  # file name
    sha256: str = ""


def normalised(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_files() -> list[Path]:
    """Those that the scripts install; requirements-nnunet.txt is for an environment of its own."""
    apart = (LOCK, ROOT / "requirements-nnunet.txt")
    return sorted(path for path in ROOT.glob("requirements*.txt") if path not in apart)


def read_report(report: dict) -> dict[str, Locked]:
    """What a report of `pip install --report` lists, by normalised name."""
    found = {}
    for item in report["install"]:
        name, version = (
            normalised(item["metadata"]["name"]),
            item["metadata"]["version"].partition("+")[0],
        )
        info = item["download_info"]
        archive = Path(unquote(urlsplit(info["url"]).path)).name
        digest = info.get("archive_info", {}).get("hashes", {}).get("sha256", "")
        found[name] = (
            Locked(version) if name in BUILDS or not digest else Locked(version, archive, digest)
        )
    return found


def read_lock(text: str) -> dict[str, Locked]:
    """The lines `name==version  # archive sha256:digest` of a lock."""
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(
            r"([\w.-]+)==([^\s#]+)(?:\s+# (\S+) sha256:([0-9a-f]{64}))?", line
        ):
            found[match[1]] = Locked(match[2], match[3] or "", match[4] or "")
        elif line.strip() and not line.startswith("#"):
            raise ValueError(
                f"{LOCK.name}: cannot read the line {line!r}; write the file anew with "
                "tools/lock.py"
            )
    return found


def written(packages: dict[str, Locked]) -> str:
    lines = []
    for name, package in sorted(packages.items()):
        known = f"  # {package.archive} sha256:{package.sha256}" if package.sha256 else ""
        lines.append(f"{name}=={package.version}{known}\n")
    return HEADER + "".join(lines)


def compared(
    locked: dict[str, Locked], found: dict[str, Locked]
) -> tuple[list[str], int, list[str]]:
    """What of `found` departs from the lock, how many archives have the known hash, and which
    packages it lacks.
    """
    wrong, verified, unknown = [], 0, []
    for name, package in sorted(found.items()):
        expected = locked.get(name)
        if expected is None:
            unknown.append(name)
        elif package.version != expected.version:
            wrong.append(f"{name}: version {package.version}, locked {expected.version}")
        elif package.archive == expected.archive and package.sha256:
            if package.sha256 == expected.sha256:
                verified += 1
            else:
                wrong.append(
                    f"{package.archive}: sha256 {package.sha256}, locked {expected.sha256}"
                )
    return wrong, verified, unknown


def ask_pip(*options: str) -> dict[str, Locked]:
    """What pip would install for all requirement files into an empty environment; downloads,
    installs nothing.
    """
    files = [word for path in requirement_files() for word in ("-r", str(path))]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--report",
        "-",
    ]
    run = subprocess.run([*command, *files, *options], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit("error: pip could not resolve the requirements (see above)")
    return read_report(json.loads(run.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with what pip would install")
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="REPORT",
        help="compare with a report of pip install --report",
    )
    args = parser.parse_args()
    if not (args.check or args.verify):
        packages = ask_pip()
        LOCK.write_text(written(packages), encoding="utf-8")
        print(f"{LOCK.name}: {len(packages)} packages")
        return 0
    locked = read_lock(LOCK.read_text(encoding="utf-8"))
    if args.verify:
        found = read_report(json.loads(args.verify.read_text(encoding="utf-8")))
    else:
        found = ask_pip("-c", str(LOCK))
    wrong, verified, unknown = compared(locked, found)
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    if unknown:
        print(f"note: not in {LOCK.name}: {', '.join(unknown)}")
    print(
        f"{len(found)} packages, {verified} archives verified by SHA-256, {len(wrong)} problem(s)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
