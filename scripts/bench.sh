#!/bin/sh
# Every speed measurement, each against a named peer in the same run; writes the tables to benchmarks/RESULTS.md and
# fails if a bar is missed. On an idle computer; two cores: about half an hour. With a GPU also benchmarks/gpu.py.
#
#   sh scripts/bench.sh
#   ONLY="metrics_speed boundary" THREADS=1 sh scripts/bench.sh    # some of them, the file keeps the others
#   SMALL=1 OUT=small.md sh scripts/bench.sh                  # tiny sizes, to see that all of it runs
REQUIREMENTS=requirements-dev.txt
. "$(dirname "$0")/setup.sh"
out=${OUT:-benchmarks/RESULTS.md} threads=${THREADS:-$(getconf _NPROCESSORS_ONLN)} status=0
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
names="complexity metrics_speed boundary distill_step crkd_step inference_speed data_speed"
if $python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then names="$names gpu"; fi
for name in ${ONLY:-$names}; do
    printf '\n== benchmarks/%s.py\n' "$name"
    small=${SMALL:+--small}
    [ "$name" != complexity ] || small=${SMALL:+"--size 32 --repeats 1"}
    # shellcheck disable=SC2086
    $python "benchmarks/$name.py" --threads "$threads" --out "$parts/$name.md" $small || { status=1; echo "FAILED: $name"; }
done
$python - "$parts" "$out" <<'PYTHON'
"""Put the new tables in the place of the old ones of the same name; the rest of the file stays."""
import sys
from pathlib import Path

parts, out = map(Path, sys.argv[1:])
head = "# Speed\n\nWritten by `sh scripts/bench.sh`: what each part is compared with is in the header of its script.\n"
sections = {}
for block in (out.read_text(encoding="utf-8") if out.exists() else head).split("\n## ")[1:]:
    name, _, body = block.partition("\n")
    sections[name] = body.strip()
for part in sorted(parts.glob("*.md")):
    sections[f"benchmarks/{part.stem}.py"] = part.read_text(encoding="utf-8").strip()
text = head + "".join(f"\n## {name}\n\n{body}\n" for name, body in sections.items())
out.write_text(text, encoding="utf-8")
print(f"tables in {out}")
PYTHON
exit $status
