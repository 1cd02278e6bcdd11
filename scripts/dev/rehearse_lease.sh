#!/usr/bin/env bash
# The lease without a GPU: the files that the machine would get are copied to an empty folder, both calls run there on the CPU, and the
# archive is imported into a scratch copy of results/. PYTHON: an interpreter with the GPU machine's versions (make test-oldest makes one).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(command -v "${PYTHON:?}") work=$(mktemp -d)
[[ $python == /* ]] || python=$PWD/$python
trap 'rm -rf "$work"' EXIT

mkdir "$work/copy" "$work/absent"
{
    git ls-files --cached --others --exclude-standard
    [[ ! -d .lease ]] || find .lease -type f
} | while IFS= read -r file; do [[ ! -e $file ]] || echo "$file"; done | tar -c --files-from=- | tar -x -C "$work/copy"
size=$(du -sm "$work/copy" | cut -f1)
echo "$size MiB travel"
((size <= 64)) || { echo "allowed: 64 MiB" >&2; exit 1; }
echo "raise ModuleNotFoundError('no wandb on this machine', name='wandb')" >"$work/absent/wandb.py"

cd "$work/copy"
for call in a b; do
    REHEARSE=1 PYTHON=$python PYTHONPATH=$work/absent bash scripts/dev/lease.sh $call "$work/out"
done
[[ ! -f .lease/images.tar.xz || -f outputs/lease/cifar10.npz ]] # decoded by now
if [[ -d .lease ]]; then # these came with it, as the machine has none
    PYTHONPATH=outputs/lease/site "$python" -c 'import hydra, omegaconf; assert "lease/site" in hydra.__file__ and "lease/site" in omegaconf.__file__'
fi
cd - >/dev/null
cp -r results "$work/results"
"$python" scripts/import_results.py "$work/out/leaseb.tar.gz" --results "$work/results"
"$python" scripts/gpu_battery.py --profile lease --dry
