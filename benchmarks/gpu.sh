#!/usr/bin/env bash
# Everything that needs a GPU, in under eight minutes on a fresh machine without a network: builds the kernels, runs the
# ops' tests on them and those of the loop on CUDA, then the benchmarks, then the ops' tests under compute-sanitizer.
#
#   benchmarks/gpu.sh            the rows go to benchmarks/results
#   benchmarks/gpu.sh --quick    without the sanitizer and the benchmarks
#   SECONDS_IN_ALL=900 benchmarks/gpu.sh    with more time
#
# Needs torch with CUDA, nvcc, ninja, filelock, numpy, pillow, torchvision, pytest, pytest-benchmark and hypothesis;
# open_clip, with the ftfy and wcwidth that it imports, for whole images and the towers; kornia as a peer of the views.
# Every stage runs, whatever the others did, for as long as there is time; the last lines say how each went, and the exit
# status is 0 only if all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
quick=false
case "${1:-}" in
  "") ;;
  --quick) quick=true ;;
  *) echo "usage: benchmarks/gpu.sh [--quick]" >&2; exit 2 ;;
esac
stop() { echo "gpu.sh: $*" >&2; exit 2; }

"$python" -c 'import torch' 2>/dev/null || stop "expected a python with torch, $python has none (set PYTHON)"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || stop "expected a GPU, torch sees none"
missing=$("$python" - <<'PYTHON'
from importlib.util import find_spec
needed = "ninja filelock numpy PIL torchvision pytest pytest_benchmark hypothesis"
print(*(name for name in needed.split() if find_spec(name) is None))
PYTHON
)
[[ -z $missing ]] || stop "these Python packages are missing: $missing"
without=$("$python" -c 'import open_clip' 2>&1) && open_clip=true || open_clip=false
without="open_clip cannot be imported: ${without##*$'\n'}"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TPT_FAST_BACKEND=native TPT_FAST_CACHE=${TPT_FAST_CACHE:-$scratch/cache} PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1
summary=() failed=0 in_all=${SECONDS_IN_ALL:-470}

# stage NAME SECONDS COMMAND...
stage() {
  local name=$1 limit=$2 began=$SECONDS how=passed left=$((in_all - SECONDS))
  shift 2
  if ((left < 5)); then
    skip "$name" "no time left"
    failed=1
    return
  fi
  ((limit <= left)) || limit=$left
  printf '\n=== %s (%d s so far)\n' "$name" "$SECONDS"
  timeout --kill-after=15 "$limit" "$@"
  local code=$?
  if ((code == 124 || code == 137)); then how="stopped after $limit s"; elif ((code)); then how="FAILED ($code)"; fi
  ((code == 0)) || failed=1
  summary+=("$(printf '%-44s %-22s %4d s' "$name" "$how" $((SECONDS - began)))")
}
skip() { summary+=("$(printf '%-44s %s' "$1" "left out: $2")"); }

pytest=("$python" -m pytest -q -p no:cacheprovider --tb=short -o faulthandler_timeout=40)
op_tests=()
for source in csrc/*.cu; do op_tests+=("tests/test_$(basename "$source" .cu).py"); done
ops_on_cuda=("${pytest[@]}" -p on_cuda.plugin "${op_tests[@]}")

stage "the machine and the build" 200 "$python" - <<'PYTHON'
import json
from tpt_fast.doctor import examine

report = examine()
print(json.dumps(vars(report), indent=1))
raise SystemExit(not report.works)
PYTHON
stage "the ops' tests on CUDA" 120 "${ops_on_cuda[@]}"
stage "repeats, graph replays, streams" 60 "${pytest[@]}" tests/test_devices.py
if $open_clip; then
  stage "the loop on CUDA" 120 "${pytest[@]}" tests/test_tuner_on_cuda.py
else
  skip "the loop on CUDA" "$without"
fi

bench=("$python" -m pytest -q -s -p no:cacheprovider --rows --benchmark-columns=median)
if $quick; then
  skip "benchmarks and compute-sanitizer" "--quick"
else
  if $open_clip; then
    stage "benchmarks of whole images" 120 "${bench[@]}" benchmarks/bench_tune.py
    stage "the kernels of one image" 40 "$python" benchmarks/kernels.py
  else
    skip "benchmarks of whole images and towers" "$without"
  fi
  stage "benchmarks of views, objective, update" 80 "${bench[@]}" \
    benchmarks/bench_views.py benchmarks/bench_objective.py benchmarks/bench_adamw_step.py
  if $open_clip; then
    stage "benchmarks of the towers' ops" 110 "${bench[@]}" \
      benchmarks/bench_add_layer_norm.py benchmarks/bench_bias_act.py benchmarks/bench_prefix_attention.py
    stage "benchmarks of the image towers" 60 "${bench[@]}" benchmarks/bench_vision.py
  fi
  sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
  for tool in memcheck racecheck; do
    if [[ -n $sanitizer ]]; then
      # torch's cache would hide an access beyond a tensor that stays in its block; the libraries around the kernels
      # probe for driver functions that are not there; importing torch takes longer than the tool waits by itself.
      options=(--tool "$tool" --error-exitcode 3 --report-api-errors no --launch-timeout 0 --kernel-regex 'kns=tpt_fast')
      stage "compute-sanitizer $tool" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" "${options[@]}" "${ops_on_cuda[@]}" -x --short
    else
      skip "compute-sanitizer $tool" "not found beside nvcc"
    fi
  done
fi

printf '\n=== %d s\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
exit $failed
