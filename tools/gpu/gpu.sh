#!/usr/bin/env bash
# Proves or refutes on an H100 or H200 what this repository claims: builds the extension, runs the GPU tests and the
# sanitizers, and measures. Needs no network: Python 3.11+, torch with CUDA, triton, numpy, tqdm, pytest, hypothesis,
# pybind11, nvcc, cmake and ninja; compute-sanitizer for its part.
#
#   tools/gpu/gpu.sh                    all parts in order of importance, in under 9 minutes
#   tools/gpu/gpu.sh tests_norms plan   only these parts, again if they were done
#   tools/gpu/gpu.sh --dry-run          runs nothing; checks that every file, module, test and flag below exists
#   tools/gpu/gpu.sh --list             names of the parts
#
# A part that succeeded leaves a stamp in build/gpu, named after the commit: run the script again and it goes on after
# it. A part that fails or runs out of its time is reported at the end and does not stop the others; on a machine that starts
# bare, name the parts that the last line of the run before lists. WAM_BENCH_COMMIT names the commit where there is no
# .git. GPU_SECONDS is the time for all parts (default 530). PYTHON is the interpreter. Rows are appended to
# bench/results/*.jsonl. With OUT set, log, rows and tuned choices are copied there after every part. Clocks, power limits
# and other settings of the GPU are never touched.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-python3}
# Triton compiles on the CPU, so several test processes share the GPU, where pytest-xdist is installed. Their number leaves
# room for the largest tests (10 GB) in each.
AT_ONCE=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 6")
export PYTHONUNBUFFERED=1  # a part that is stopped leaves what it printed
export PATH=$PATH:/usr/local/cuda/bin  # where nvcc and compute-sanitizer may be without being on PATH
SECONDS_IN_ALL=${GPU_SECONDS:-530}
# Group, suite and seconds of every suite that is measured here, as bench/registry.py has them.
mapfile -t SUITES < <("$PYTHON" -m bench.registry)
PARTS=(
  machine build tests_attention tests_hopper tests_norms tests_cached tests_cuda tests_model
  $(printf '%s\n' "${SUITES[@]%% *}" | awk '!known[$0]++') memcheck racecheck tune
)

# ---- parts: run SECONDS COMMAND...; the seconds are a cap, a part is its commands in order ----

machine() {
  run 30 nvidia-smi
  run 60 "$PYTHON" -m wam_models.cli doctor
}

build() {
  run 150 cmake --fresh -S . -B build/cuda -G Ninja \
    "-DCMAKE_CUDA_COMPILER=$(command -v nvcc || echo nvcc)" \
    "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/wam_kernels" "-DPython_EXECUTABLE=$(command -v "$PYTHON")" \
    "-Dpybind11_DIR=$("$PYTHON" -m pybind11 --cmakedir)" &&
    run 150 cmake --build build/cuda &&
    run 60 "$PYTHON" -c "from wam_kernels.runtime.cuda import extension; print(extension())"
}

# GPU suites: float64 budgets, every backend, torch.compile, CUDA graphs, the same bits over 100 runs. All failures of a
# part are found in one run; one part an op, because an illegal access ends everything in its process.
gpu_tests() { run 150 "$PYTHON" -m pytest -q --tb=short $AT_ONCE "$@"; }
tests_attention() { gpu_tests tests/gpu/test_block_attention.py; }
# the attention kernels of csrc: first what the driver may refuse, one by one
tests_hopper() { gpu_tests tests/gpu/test_block_attention_cuda.py tests/csrc/test_block_attention.py -k gpu; }
tests_norms() { gpu_tests tests/gpu/test_adaln.py tests/gpu/test_qk_norm_rope.py; }
# the kernel by TMA and wgmma first: what the driver may refuse, one by one
tests_cached() { gpu_tests tests/gpu/test_cached_attention_cuda.py tests/gpu/test_cached_attention.py; }
# CUDA graphs equal eager passes, flat memory, nothing waits for the device; a training step has the numbers of a CPU
tests_model() { gpu_tests tests/gpu/test_rollout.py tests/gpu/test_training.py; }
# the CUDA launchers on the compiled extension; on a CPU the same tests run on the host emulation
tests_cuda() {
  gpu_tests tests/csrc/test_adaln.py tests/csrc/test_qk_norm_rope.py tests/csrc/test_cached_attention.py -k gpu
}

# Every kernel of this repository under compute-sanitizer; those of PyTorch and cuBLAS, which the references use, would
# take most of the time
sanitize() {
  run 120 compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes application-only \
    --kernel-name-exclude kns=at6native,kns=cublas,kns=cutlass,kns=gemm "$PYTHON" -m tools.gpu.sanitize
}
# without torch's cache every tensor is an allocation of its own, so that a step outside it is found
memcheck() { PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitize memcheck; }
racecheck() { sanitize racecheck; }

# The suites of one group, all of them whatever the first says. --quick on a GPU is the real sizes with few repeats. Rows
# are kept one by one.
measure() {
  local row group suite seconds code=0
  for row in "${SUITES[@]}"; do
    read -r group suite seconds <<<"$row"
    [ "$group" = "$1" ] || continue
    run "$seconds" "$PYTHON" -m bench.suites "$suite" --quick --record --device cuda || code=$?
  done
  return $code
}

tune() { run 240 "$PYTHON" -m bench tune; }

# ---- machinery ----

# A part is a function of its name, or a group of suites.
part() { if declare -F "$PART" >/dev/null; then "$PART"; else measure "$PART"; fi; }

DRY=""
run() {
  local cap=$1 left
  shift
  if [ -n "$DRY" ]; then
    printf '%s\t' "$PART" && printf '%q ' "$@" && printf '\n'
    return 0
  fi
  left=$((SECONDS_IN_ALL - SECONDS))
  if [ "$left" -lt 10 ]; then
    echo "gpu.sh: no time left for: $*"
    return 124
  fi
  echo "+ $*"
  timeout --kill-after=10 "$((left < cap ? left : cap))" "$@"
}

case "${1:-}" in
  --list)
    printf '%s\n' "${PARTS[@]}"
    exit 0
    ;;
  --dry-run)
    DRY=1
    for PART in "${PARTS[@]}"; do part; done | "$PYTHON" -m tools.gpu.dry_run
    exit $?
    ;;
esac

for name in "$@"; do
  case " ${PARTS[*]} " in
    *" $name "*) ;;
    *)
      echo "gpu.sh: $name must be one of: ${PARTS[*]}" >&2
      exit 2
      ;;
  esac
done

COMMIT=${WAM_BENCH_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
export WAM_BENCH_COMMIT=$COMMIT
STAMPS=build/gpu/$COMMIT
mkdir -p "$STAMPS"
LOG=$STAMPS/log.txt
rm -f "$STAMPS/summary.txt"

# after every part, so that a run that is ended from outside leaves what it has
copy_out() {
  [ -z "${OUT:-}" ] && return
  mkdir -p "$OUT" && cp "$LOG" "$OUT/gpu.log"
  tar -czf "$OUT/results.tgz" bench/results $(ls wam_kernels/runtime/tuned/*.json 2>/dev/null)
}
LEFT=""

for PART in "${@:-${PARTS[@]}}"; do
  if [ $# -eq 0 ] && [ -e "$STAMPS/$PART.ok" ]; then
    echo "$PART: done before" >>"$STAMPS/summary.txt"
    continue
  fi
  begin=$SECONDS
  echo "=== $PART, $(date -u +%H:%M:%S)" | tee -a "$LOG"
  part 2>&1 | tee -a "$LOG"
  code=${PIPESTATUS[0]}
  if [ "$code" -eq 0 ]; then
    touch "$STAMPS/$PART.ok"
    echo "$PART: ok, $((SECONDS - begin)) s" >>"$STAMPS/summary.txt"
  else
    echo "$PART: FAILED with $code (124: out of time), $((SECONDS - begin)) s" >>"$STAMPS/summary.txt"
    LEFT="$LEFT $PART"
  fi
  copy_out
done

echo "=== commit $COMMIT, $SECONDS s" | tee -a "$LOG"
tee -a "$LOG" <"$STAMPS/summary.txt"
[ -n "$LEFT" ] && echo "left: tools/gpu/gpu.sh$LEFT" | tee -a "$LOG"
copy_out
[ -z "$LEFT" ]
