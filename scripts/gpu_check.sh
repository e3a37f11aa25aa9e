#!/usr/bin/env bash
# Runs what only a CUDA device can run, on a machine that has Python, torch, numpy and pytest and may
# have no network: tests/gpu, then the CUDA lines of the bench. Takes at most eight minutes.
#
#   scripts/gpu_check.sh [WHEELS]             everything; raw output goes to one file
#   scripts/gpu_check.sh --dry-run [WHEELS]   all but the device: packages, collection, imports
#   scripts/gpu_check.sh fetch [WHEELS]       downloads what such a machine may lack, to be carried there
#
# WHEELS is a folder, by default .gpu-wheels. Of what lies in it only what the machine lacks is
# installed, into a temporary folder. Settings, all of them environment variables:
#
#   PYTHON         the interpreter that has torch (default python3)
#   OUT            where the output file goes (default bench/results)
#   FETCH_PYTHON   the version of Python to fetch for (default 3.12)
#
# Exit status: 0 all passed; 1 something failed; 2 it could not run: no usable device, or a package
# is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly TOTAL_SECONDS=470 BENCH_SECONDS=100
readonly FAILED=1 CANNOT_RUN=2
# Import name and name in the index of all that tests/gpu and the bench need beside torch, numpy and
# pytest with what those bring.
readonly NEEDED=(
  pydantic=pydantic
  pydantic_core=pydantic-core
  annotated_types=annotated-types
  typing_inspection=typing-inspection
  typing_extensions=typing-extensions
  pytest_asyncio=pytest-asyncio
  pytest_timeout=pytest-timeout
  hypothesis=hypothesis
  sortedcontainers=sortedcontainers
  safetensors=safetensors
)

# Every stage gets what is left of the total, less this much for those after it.
within() { # seconds to leave, the command
  local left="$((TOTAL_SECONDS - SECONDS - $1))"
  shift
  timeout --kill-after=10 "$((left > 0 ? left : 1))" "$@"
}

mode=run
case "${1:-}" in
  --dry-run) mode=dry-run; shift ;;
  fetch) mode=fetch; shift ;;
  -*) echo "unknown option $1; see the head of $0" >&2; exit "$CANNOT_RUN" ;;
esac
wheels="${1:-.gpu-wheels}"
python="${PYTHON:-python3}"

fetch() { # folder, names, then more of pip's options
  local folder="$1"
  shift
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --constraint constraints.txt --dest "$folder" "$@"
}

if [ "$mode" = fetch ]; then
  mkdir -p "$wheels"
  platforms=()
  for tag in manylinux1 manylinux2014 manylinux_2_17 manylinux_2_27 manylinux_2_28; do
    platforms+=(--platform "${tag}_x86_64")
  done
  fetch "$wheels" "${NEEDED[@]#*=}" --implementation cp "${platforms[@]}" \
    --python-version "${FETCH_PYTHON:-3.12}"
  du -ch "$wheels"/*.whl
  exit
fi

temporary="$(mktemp -d)"
trap 'rm -rf "$temporary"' EXIT
site="$temporary/site"
mkdir "$site"
root="$PWD"
export PYTHONPATH="$site:$root:$root/proto:$root/client:$root/server:$root/models"
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # as the server sets it

missing() { # the names in the index of what cannot be imported
  "$python" - "${NEEDED[@]}" <<'PYTHON'
import importlib.util, sys

pairs = [pair.split("=") for pair in sys.argv[1:]]
print(*[name for module, name in pairs if importlib.util.find_spec(module) is None])
PYTHON
}

install() {
  local names
  read -ra names <<<"$(missing)"
  [ "${#names[@]}" -gt 0 ] || return 0
  echo "not on this machine: ${names[*]}"
  mkdir -p "$wheels"
  local from=("$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps
    --no-compile --find-links "$wheels" --target "$site")
  if ! "${from[@]}" "${names[@]}"; then
    echo "$wheels lacks some of them; asking the package index"
    fetch "$wheels" "${names[@]}" && "${from[@]}" "${names[@]}"
  fi
}

if ! within "$BENCH_SECONDS" "$python" -c 'import numpy, pytest, torch'; then
  echo "$python has no torch, numpy or pytest: set PYTHON to an interpreter that has them" >&2
  exit "$CANNOT_RUN"
fi
if ! install >&2 || [ -n "$(missing)" ]; then
  echo "still missing: $(missing). Run '$0 fetch' where there is a package index, and bring the" \
    "folder of wheels along" >&2
  exit "$CANNOT_RUN"
fi

device() { # its name, or why there is none
  within "$BENCH_SECONDS" "$python" - <<'PYTHON'
import sys, torch
from conveyor_server.engine.devices import find_device

choice = find_device("auto")
if choice.device.type != "cuda":
    sys.exit(choice.passed_over or "torch.cuda.is_available() is False")
print(torch.cuda.get_device_name(choice.device))
PYTHON
}
about() {
  date -u '+%Y-%m-%dT%H:%M:%SZ'
  git log -1 --format='commit %H' 2>/dev/null || echo 'commit unknown'
  within "$BENCH_SECONDS" nvidia-smi --format=csv \
    --query-gpu=name,driver_version,memory.total,clocks.max.sm || echo 'nvidia-smi does not answer'
  within "$BENCH_SECONDS" "$python" - <<'PYTHON'
import platform, torch
from bench import facts

print("Python", platform.python_version(), "on", facts.machine()["cpu"])
print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
print(facts.cuda_device())
print(facts.versions())
PYTHON
}
run_tests() {
  # An end by the clock is an interrupt to pytest, so that it reports what it found until then.
  within "$((BENCH_SECONDS + 10))" "$python" -c '
import signal, sys, pytest

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
sys.exit(pytest.main(sys.argv[1:]))
' tests/gpu -q -ra --durations=15 --timeout=200 -p no:cacheprovider
}
run_bench() {
  within 10 "$python" -m bench --only cuda --json "$temporary/bench.json"
}

status=0
stage() { # name, then the command
  local name="$1" began="$SECONDS" code=0
  shift
  echo "=== $name"
  "$@" 2>&1 || code="$?"
  echo "=== $name: $([ "$code" = 0 ] && echo passed || echo "FAILED, status $code") after $((SECONDS - began)) s"
  [ "$code" = 0 ] || status="$FAILED"
}

everything() {
  stage 'the machine' about
  stage 'tests/gpu' run_tests
  stage 'the bench' run_bench
  [ -s "$temporary/bench.json" ] && cat "$temporary/bench.json"
  echo "=== $([ "$status" = 0 ] && echo 'all passed' || echo 'FAILED') after $SECONDS s"
  return "$status"
}

collected="$(within "$BENCH_SECONDS" "$python" -m pytest tests/gpu --collect-only -q \
  -p no:cacheprovider)" || {
  echo "$collected"
  echo "tests/gpu does not collect" >&2
  exit "$FAILED"
}
tail -n 1 <<<"$collected"
within "$BENCH_SECONDS" "$python" -c 'import bench.__main__, bench.cuda' || exit "$FAILED"
echo "the bench can be imported"
if [ "$mode" = dry-run ]; then
  exit 0
fi

if ! name="$(device)"; then
  echo "there is no CUDA device that can be used, so nothing was run: ${name:-see above}" >&2
  exit "$CANNOT_RUN"
fi
slug="$(tr '[:upper:]' '[:lower:]' <<<"$name" | tr -cs '[:alnum:]\n' '-')"
mkdir -p "${OUT:-bench/results}"
file="${OUT:-bench/results}/$(date -u +%F)-$slug.txt"
code=0
everything | tee "$file" || code="$FAILED"
echo "written to $file"
exit "$code"
