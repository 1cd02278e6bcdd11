#!/usr/bin/env bash
# The lease without a GPU: what would travel is copied to an empty folder, both calls run there on the CPU, and the archive is imported
# into a scratch copy of results/. PYTHON: an interpreter with the GPU machine's versions (make test-oldest builds one).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=$PWD python=${PYTHON:?} work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/copy" "$work/absent"
{ git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done; find .lease -type f -print0; } |
    tar -c --null --files-from=- | tar -x -C "$work/copy"
size=$(du -sm "$work/copy" | cut -f1)
((size <= 64)) || { echo "$size MiB would travel, allowed: 64" >&2; exit 1; }
for name in wandb hydra omegaconf antlr4; do # the machine has none of these: only .lease/wheels may bring them
    [[ $name == wandb ]] && echo "raise ModuleNotFoundError('No module named wandb', name='wandb')" >"$work/absent/$name.py"
    echo "import importlib.util as u; s = u.find_spec('$name'); assert s is None or '/lease/site/' in s.origin or s.origin.startswith('$work/absent'), s.origin"
done >"$work/check.py"

cd "$work/copy"
for call in a b; do
    REHEARSE=1 PYTHON=$python PYTHONPATH=$work/absent bash scripts/dev/lease.sh $call "$work/out"
done
PYTHONPATH=outputs/lease/site:$work/absent "$python" "$work/check.py"
wait
cd "$root"
cp -r results "$work/results"
"$python" scripts/import_results.py "$work/out/leaseb.tar.gz" "results=$work/results"
"$python" scripts/gpu_battery.py profile=lease dry=true
