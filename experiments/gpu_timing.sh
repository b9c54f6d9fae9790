#!/usr/bin/env bash
# experiments/gpu_timing.sh [--tiny] [OUTPUT]: all timings of decoding on one GPU, in under 9 minutes.
#
# Needs the library's core dependencies only. Where torch with CUDA and transformers are there too, the rest of the time
# goes to the comparison with them. --tiny runs tiny shapes, also on a CPU. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
tiny=()
if [ "${1:-}" = --tiny ]; then tiny=(--tiny); shift; fi
output=${1:-runs/gpu_timing}
limit=530
# The comparison has torch's memory beside JAX's.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

seconds=500
has_torch=false
if "$python" -c 'import sys, torch, transformers; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  has_torch=true
  seconds=330
fi
SECONDS=0
"$python" -m experiments.gpu_timing --output="$output" --seconds=$seconds "${tiny[@]}"
if $has_torch; then
  family=llama_2_7b
  if [ ${#tiny[@]} -gt 0 ]; then family=mini; fi
  # Its rows are written one by one: what the time cuts off is only what is left.
  timeout $((limit - SECONDS)) "$python" -m experiments.compare_decode --family=$family --batch=32,1 --new_tokens=128 \
    --repetitions=1 --output="$output/compare_decode.json" || echo 'the comparison with transformers did not end'
else
  echo 'no comparison with transformers: torch with CUDA, or transformers, is not there'
fi
