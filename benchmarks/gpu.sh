#!/usr/bin/env bash
# STDiT3-XL/2 with random weights on one GPU, in under 9 minutes: 480p 2s and 720p 4s end to end, 30 steps with
# guidance, exact, with peak memory under each plan; 144p 2s, whose steps are short, as they are and replayed; the share
# of the GPU's peak that a 240p training step reaches.
# DRY=1 runs the same on a CPU with tiny models and sizes. Usage: [DRY=1] benchmarks/gpu.sh [folder of results]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-results}
mkdir -p "$out"
failed=0
flags=()
if [[ -n "${DRY:-}" ]]; then flags=(--dry); fi
run() { # seconds, arguments: what takes too long is left out, and the rest goes on
    timeout "$1" "${PYTHON:-python}" -m benchmarks.gpu "${@:2}" "${flags[@]}" --output "$out" || {
        failed=$?
        echo "benchmarks.gpu ${*:2} ended with status $failed" >&2
    }
}
run 150 end-to-end --size 480p-2s
run 130 end-to-end --size 720p-4s # what the run before has compiled is kept on the disk
run 45 end-to-end --size 720p-4s --memory balanced --steps 3
run 35 end-to-end --size 720p-4s --memory low --steps 3
run 40 end-to-end --size 144p-2s --eager
run 40 end-to-end --size 144p-2s --eager --graphs
run 95 train --size 240p-2s
exit "$failed"
