#!/usr/bin/env bash
# One call of the lease on the GPU machine, in a copy of the checkout that has .lease/ (make lease-pack):
#
#   bash scripts/dev/lease.sh a OUT          then, on the same warm machine,          bash scripts/dev/lease.sh b OUT
#
# OUT gets lease<call>.tar.gz, renewed every ten seconds. Needs python3 with PyTorch and Triton; no network, no git. REHEARSE=1 runs the
# same commands on a CPU, small. PYTHON names another interpreter. The machine must have what .lease/ lacks, or does without it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
call=$1 out=$2 python=${PYTHON:-python3}
site=$PWD/outputs/lease/site

mkdir -p "$site/actpress"
if [[ -d .lease/wheels && ! -d $site/omegaconf ]]; then # packages that the machine lacks
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .lease/wheels/*.whl
fi
ln -sfn "$PWD"/src/actpress/{__init__.py,[a-z]*} "$PWD/kernels" "$site/actpress/" # the package is the checkout, by links
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
if [[ -f .lease/commit ]] && sha256sum --quiet --check .lease/files.sha256; then # unchanged since it was packed
    ACTPRESS_COMMIT=$(cat .lease/commit)
    export ACTPRESS_COMMIT
fi
if [[ -f .lease/images.tar.xz && ! -f outputs/lease/cifar10.npz ]]; then # in the background; the runs of the second call read it
    (
        rm -rf outputs/lease/images
        "$python" -m tarfile -e .lease/images.tar.xz outputs/lease/images # tar would need xz
        exec nice "$python" scripts/pack_images.py cifar10 --root "$(echo outputs/lease/images/*)" --out outputs/lease/cifar10.npz
    ) >outputs/lease/images.log 2>&1 &
fi
export TRITON_CACHE_DIR=$PWD/outputs/lease/triton ACTPRESS_KERNELS=none
if [[ -f .lease/kernels.tar.gz ]]; then # compiled beforehand; if they do not fit, compiled here by 16 processes in some 20 s
    mkdir -p outputs/lease/kernels
    tar -xzf .lease/kernels.tar.gz -C outputs/lease/kernels
    kernels() { "$python" scripts/dev/prebuild_kernels.py "$1" outputs/lease/kernels "$TRITON_CACHE_DIR" "${@:2}"; }
    ACTPRESS_KERNELS="compiled beforehand"
    kernels unpack || { ACTPRESS_KERNELS="compiled on the machine"; kernels warm --workers 16; } || ACTPRESS_KERNELS=incomplete
fi
spent=$((SECONDS < 120 ? SECONDS : 120)) # seconds of the call; at most 120, since a clock that is set meanwhile must not end the call
[[ -z ${REHEARSE-} ]] || spent=0
exec "$python" scripts/gpu_battery.py --profile lease --call "$call" --spent "$spent" --out outputs/lease/results --archive "$out" \
    ${REHEARSE:+--rehearse}
