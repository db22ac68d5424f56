#!/usr/bin/env bash
# Runs the small kernel cases of tests/gpu/sanitized_kernels.py under compute-sanitizer, one process a tool:
#   memcheck   accesses out of bounds or misaligned, and errors of the kernels' launches
#   racecheck  hazards in shared memory
# Exits with the first tool's failure. Look-ups of driver symbols that a driver lacks are errors of the API, not of
# kernels, hence --report-api-errors no. SANITIZER_TOOLS picks tools, PYTHON the interpreter, SANITIZER_OUT keeps logs.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="tests:kernels:services/common:services/engine:proto/gen${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
out="${SANITIZER_OUT:-$(mktemp -d)}"
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit" >&2; exit 1; }

"$python" tests/gpu/sanitized_kernels.py # compiles the kernels, and shows that the cases pass without a tool
for tool in ${SANITIZER_TOOLS:-memcheck racecheck}; do
    began=$SECONDS
    status=0
    timeout "${SANITIZER_TIMEOUT_S:-280}" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
        --log-file "$out/$tool.log" \
        "$python" tests/gpu/sanitized_kernels.py || status=$?
    tail -n 3 "$out/$tool.log" 2>/dev/null || true
    echo "$tool: exit code $status after $((SECONDS - began)) s, log in $out/$tool.log"
    [ "$status" -eq 0 ] || exit "$status"
done
