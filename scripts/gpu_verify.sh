#!/usr/bin/env bash
# Builds, checks, measures and tests on a machine with a GPU, without a network:
#
#   scripts/gpu_verify.sh [stage ...]      (default: all, in this order)
#
#   build         the package with its extension
#   checks        what only a device can show (benchmarks/check_device.py)
#   replays       a latent and a token step alone, five shapes, batch 1, with and without PDL, beside the predictions
#   chain         chains of agents, capacity, rows of a batch
#   engine        steps of the engine beside its peers
#   tests         all tests
#   tune          the tiles that the engine uses, into latentmas_kernels/ops/triton/tuned
#   ops, steps, replays_more, engine_more      single ops, the published loop, more batches, more cells
#
# The first three take six minutes at most, so that a slot of 15 minutes has times of a step whatever happens later.
#
# Needs a python3 that has torch, transformers, triton, numpy, psutil, rich, pybind11, setuptools, cmake, ninja, hypothesis,
# pytest, pytest-xdist and pytest-benchmark. Numbers go to benchmarks/results/<name of the GPU>.json after every cell, where the
# stages that passed are marked as well: a stage that has its mark is skipped, and a stage that was cut off goes on with the
# cells that are left. benchmarks/results/<name of the GPU>.md is a table of the numbers.
#
#   FORCE=1          run the stages again that are marked
#   DEVICE=cpu       a dry run without a GPU, few rounds, into benchmarks/results/cpu.json
#   PYTHON=...       another python than python3
#   COMMIT=...       what the marks should say where there is no git repository
#   OUT=folder       results, their table, one log and the tuned tiles go there; it goes on from benchmarks/results
set -euo pipefail
cd "$(dirname "$0")/.."

all="build checks replays chain engine tests tune ops steps replays_more engine_more"
stages=("$@")
if [ ${#stages[@]} -eq 0 ]; then stages=($all); fi
for stage in "${stages[@]}"; do
    case " $all " in
        *" $stage "*) ;;
        *) echo "unknown stage $stage; there are $all" && exit 2 ;;
    esac
done

# Seconds after which a stage is ended; the first three are short on a device, whose time is counted.
limit_of() {
    case $DEVICE:$1 in
        cuda:build) echo 140 ;;
        cuda:checks) echo 95 ;;
        cuda:replays) echo 115 ;;
        *) echo "${SECONDS_PER_STAGE:-450}" ;;
    esac
}

export DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3} LOGS=build/gpu_verify AGAIN=""
if [ "${FORCE:-0}" = 1 ]; then AGAIN=--force; fi
COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
# pyproject's `-n auto` would take every core of a large machine, and each worker a CUDA context.
export WORKERS=8 ROUNDS=7 STEPS=20
export TUNED=latentmas_kernels/ops/triton/tuned TUNE="" OPS="" CELLS="" MORE="--cells 1000" CHAIN="--shape qwen3-0.6b qwen3-4b qwen3-8b"
export REPLAYS="" REPLAYS_MORE="--batch 4 8"
if [ "$DEVICE" = cpu ]; then
    # One tiny shape in Triton's interpreter, whose programs take milliseconds.
    export WORKERS=2 ROUNDS=1 STEPS=2 TINY="--shape tiny --dtype float32" INTERPRET="TRITON_INTERPRET=1 OMP_NUM_THREADS=1"
    export TUNED=$LOGS/tuned TUNE="--shape tiny --batch 1 --most 2"
    export OPS="$TINY --batch 1 --kv 40" CELLS="$TINY --kv 24" MORE="$TINY --kv 24 40" CHAIN=$TINY
    export REPLAYS="$TINY --kv 24" REPLAYS_MORE="$TINY --kv 24 --batch 2"
fi
# For a build in place (see stage_build); does no harm beside an installed package.
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$LOGS"

name=$(PYTHONPATH=benchmarks:$PYTHONPATH "$PYTHON" - <<'EOF'
import os, re, torch
from bandwidth import device_name
if os.environ["DEVICE"] == "cuda" and not torch.cuda.is_available():
    raise SystemExit("no CUDA device here; DEVICE=cpu makes a dry run")
print("cpu" if os.environ["DEVICE"] == "cpu" else re.sub("[^a-z0-9]+", "-", device_name("cuda").lower()).strip("-"))
EOF
)
if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    RESULTS=${RESULTS:-$OUT/$name.json}
    if [ ! -e "$RESULTS" ] && [ -e "benchmarks/results/$name.json" ]; then cp "benchmarks/results/$name.json" "$RESULTS"; fi
fi
export RESULTS=${RESULTS:-benchmarks/results/$name.json}

is_built() { "$PYTHON" -c "import latentmas_kernels._C, latentmas" 2>/dev/null; }

stage_build() {
    # Editable, so that tests and benchmarks, which run in this folder, see the package that was built. Where that fails
    # (an environment that cannot be written, an old setuptools), CMake puts the extension next to its sources.
    if ! "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --disable-pip-version-check -e .; then
        cmake -S . -B "$LOGS/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
            -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
            -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/latentmas_kernels"
        cmake --build "$LOGS/cmake"
    fi
    "$PYTHON" -c "import latentmas_kernels._C; from latentmas_kernels import doctor; print(doctor())"
}

# The options are lists of words, and so is INTERPRET: nothing to quote.
stage_checks() {
    env ${INTERPRET:-} "$PYTHON" -u benchmarks/check_device.py --device "$DEVICE" --seconds "$BUDGET" --out "$RESULTS" $AGAIN
}

run_replays() {
    local status=0
    env ${INTERPRET:-} "$PYTHON" -u benchmarks/bench_replay.py --device "$DEVICE" --seconds "$BUDGET" --out "$RESULTS" $AGAIN "$@" ||
        status=$?
    "$PYTHON" benchmarks/predict.py --measured "$RESULTS"
    return $status
}

stage_replays() { run_replays $REPLAYS; }

stage_replays_more() { run_replays $REPLAYS_MORE; }

stage_tests() {
    # Ops and engines on the device, the others on CPU tensors with this machine's versions of everything; and what a step
    # launches, compiled ahead of time for several GPUs.
    "$PYTHON" -m pytest -n "$WORKERS" -m "not real_model" tests
}

stage_tune() {
    local folder=${OUT:+$OUT/tuned} status=0
    folder=${folder:-$TUNED}
    mkdir -p "$folder" "$TUNED"
    # Each product at once into OUT, since the stage may be cut off; the engine reads them from the package.
    if [ "$folder" != "$TUNED" ]; then cp -r "$TUNED/." "$folder"; fi
    env ${INTERPRET:-} "$PYTHON" -u benchmarks/tune_products.py --device "$DEVICE" --seconds "$BUDGET" --folder "$folder" $TUNE ||
        status=$?
    if [ "$folder" != "$TUNED" ]; then cp -r "$folder/." "$TUNED"; fi
    return $status
}

stage_steps() {
    "$PYTHON" -u benchmarks/bench_steps.py --device "$DEVICE" --dtype bfloat16 --shape qwen3-0.6b smollm2-135m \
        --batch 1 8 --kv 256 --steps "$STEPS" --rounds "$ROUNDS" --out "$RESULTS"
}

stage_ops() {
    env ${INTERPRET:-} "$PYTHON" -m pytest benchmarks/bench_{realign,rmsnorm,rmsnorm_linear,linear_residual,gate_up_swiglu}.py \
        benchmarks/bench_{decode_attention,rerotate_keys,sample}.py \
        --device "$DEVICE" --results "$RESULTS" $OPS
}

run_engine() {
    env ${INTERPRET:-} "$PYTHON" -u benchmarks/bench_engine.py --device "$DEVICE" --seconds "$BUDGET" --out "$RESULTS" $AGAIN "$@"
}

stage_engine() { run_engine $CELLS; }

stage_engine_more() { run_engine $MORE; }

stage_chain() {
    env ${INTERPRET:-} "$PYTHON" -u benchmarks/bench_chain.py --device "$DEVICE" --seconds "$BUDGET" --out "$RESULTS" $AGAIN $CHAIN
}

# mark STAGE STATE SECONDS: into the results, with the commit, the date and the end of the stage's log.
mark() {
    PYTHONPATH=benchmarks:$PYTHONPATH "$PYTHON" - "$@" "$COMMIT" <<'EOF'
import os, pathlib, sys
from bandwidth import conditions, merge_json
stage, state, seconds, commit = sys.argv[1:]
log = pathlib.Path(os.environ["LOGS"], f"{stage}.log").read_text().splitlines()
about = conditions(os.environ["DEVICE"])
about.pop("load_average")
tail = log[-9:] if stage == "build" else log[-1:]
about |= {"state": state, "commit": commit, "seconds": int(seconds), "said": tail}
merge_json(os.environ["RESULTS"], "stages", {stage: about})
EOF
}

is_marked() {
    "$PYTHON" - "$1" <<'EOF'
import json, os, pathlib, sys
path = pathlib.Path(os.environ["RESULTS"])
stages = json.loads(path.read_text()).get("stages", {}) if path.exists() else {}
sys.exit(stages.get(sys.argv[1], {}).get("state") != "passed")
EOF
}

failed=() left=()
run_stage() {
    local stage=$1 begin=$SECONDS status=0 limit
    limit=$(limit_of "$stage")
    export BUDGET=$((limit - limit / 8))  # the rest is for starting, and for what takes longer than what came before it
    echo "== $stage"
    # In a shell of its own: timeout cannot run a function, and `set -e` does not reach into an `if`.
    timeout -k 10 "$limit" bash -euo pipefail -c "stage_$stage" 2>&1 | tee "$LOGS/$stage.log" | tee -a "${OUT:-$LOGS}/all.log" ||
        status=$?
    if [ $status = 0 ]; then
        # Without the extension many tests skip; that must not count as done.
        mark "$stage" "$(is_built && echo passed || echo "passed, but the extension is missing")" $((SECONDS - begin))
    elif [ $status = 75 ]; then  # OUT_OF_TIME in benchmarks/bandwidth.py
        left+=("$stage")
        mark "$stage" "in part" $((SECONDS - begin))
    else
        failed+=("$stage")
        echo "== $stage FAILED after $((SECONDS - begin)) s (limit $limit s), see $LOGS/$stage.log"
        mark "$stage" failed $((SECONDS - begin))
    fi
    "$PYTHON" benchmarks/table.py "$RESULTS" || echo "no table of $RESULTS"  # no reason to leave out the next stage
}
for stage in $all; do export -f "stage_$stage"; done
export -f run_engine run_replays

# The marks may come from a machine that is gone: what cannot be imported here is built, whatever they say.
if ! is_built && [ "${stages[0]}" != build ]; then stages=(build "${stages[@]}"); fi
for stage in "${stages[@]}"; do
    if [ "${FORCE:-0}" != 1 ] && is_marked "$stage" && { [ "$stage" != build ] || is_built; }; then
        echo "== $stage: passed before, see $RESULTS (FORCE=1 runs it again)"
    else
        run_stage "$stage"
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
if [ ${#left[@]} -gt 0 ]; then
    echo "passed, with more to measure in ${left[*]}: run them again; $RESULTS"
else
    echo "all passed: $RESULTS"
fi
