#!/usr/bin/env bash
# Make .lease/: what a lease needs beside the checkout (scripts/dev/lease.sh). Run it again after every change of the source.
#
#   bash scripts/dev/pack_lease.sh [IMAGES.tar.xz]      an archive NAME/{train,test}/<class>/*.jpg of CIFAR-10, for the training unit
#
# PYTHON: the interpreter of this checkout. LEASE_PYTHON: one with the GPU machine's versions; kernels are compiled for its Triton.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:?} wheels=.lease/wheels

rm -rf .lease
mkdir -p "$wheels"
git ls-files -z -- configs kernels scripts src tests pyproject.toml | xargs -0 sha256sum >.lease/files.sha256
[[ -z $(git status --porcelain -- ':!results') ]] || { echo "commit first: a lease notes the commit it measured" >&2; exit 1; }
git rev-parse HEAD >.lease/commit
pip() { "$python" -m pip --disable-pip-version-check "$@" --quiet --no-deps -c constraints.txt; }
pip wheel -w "$wheels" antlr4-python3-runtime # published as source only
pip download -d "$wheels" --only-binary=:all: hydra-core omegaconf
[[ -z ${1-} ]] || cp "$1" .lease/images.tar.xz
PYTHONPATH=scripts "$python" scripts/dev/list_kernels.py lease >.lease/kernels.yaml
"${LEASE_PYTHON:-$python}" scripts/dev/prebuild_kernels.py build .lease/kernels.yaml outputs/lease-kernels
tar -czf .lease/kernels.tar.gz -C outputs/lease-kernels .
du -sh .lease
