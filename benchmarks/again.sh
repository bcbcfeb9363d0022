#!/bin/bash
# Measures again, on one GPU, all that docs/kernels.md tells, in the order of its weight, within so many seconds.
#
#     bash benchmarks/again.sh FOLDER SECONDS
#
# FOLDER gets the committed tables with the rows measured anew in their place; what the time does not suffice for stays
# as it was, by its commit. Then `python benchmarks/goals.py` writes the page's tables.
set -u
cd "$(dirname "$0")/.."
folder=$1 seconds=$2 began=$SECONDS
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
left() { echo $((seconds - (SECONDS - began))); }
say() { echo "== [$((SECONDS - began)) s] $*"; }
run() { # at most so many seconds, which must be there
    local most=$1
    shift
    [ "$most" -gt "$(left)" ] && most=$(left)
    if [ "$most" -gt 3 ]; then timeout -s INT -k 2 "$most" "$@"; fi
}

mkdir -p "$folder"
cp -n benchmarks/results/nvidia_h200/*.csv "$folder"/
first="layers|mlps|few|decode" second="shared|tokens"
gpt=(--families dense btt "monarch(blocks=16)")
limited=("layer btt" "layer monarch")

say "compile ahead, by $(nproc) processes"
run 70 python3 benchmarks/gpu.py "$folder" --only "$first|$second" --compile "$(nproc)" >"$folder/ahead.txt" 2>&1 &
for row in 2048 1024 512; do
    run 70 python3 benchmarks/gpt_step.py "$folder/ahead" --chunks 1 --rows $row "${gpt[@]}" >>"$folder/ahead.txt" 2>&1 &
done
run 70 python3 benchmarks/counters.py "$folder/ahead.csv" --watched --seconds 40 --only "${limited[@]}" >/dev/null 2>&1 &
wait
rm -rf "$folder/ahead"

say "layers, MLPs, few tokens, decoding"
run 110 python3 benchmarks/gpu.py "$folder" --only "$first" --again
say "a training step"
run 60 python3 benchmarks/gpt_step.py "$folder" --chunks 2 --rows 1024 512 2048 "${gpt[@]}"
say "layers of one input, odd numbers of tokens"
run 40 python3 benchmarks/gpu.py "$folder" --only "$second" --again
say "counters"
if [ "$(left)" -gt 22 ]; then
    run 30 python3 benchmarks/counters.py "$folder/counters.csv" --seconds 12 --only "${limited[@]}"
fi
say "torch.compile"
run 60 python3 benchmarks/gpu.py "$folder" --only compiled --again
say "every kernel"
run "$(left)" python3 benchmarks/gpu.py "$folder" --only kernels --again --seconds "$(left)"
say "done"
