#!/bin/bash
# Trains adapters with which the default model looks things up (src/mgam/adapters/lookup), fits a policy to the model without them
# (src/mgam/adapters/default), trains low-rank adapters that read by that, and measures all, in about half an hour on one GPU.
# benchmarks/results/lookup.h200.json and adapter.h200.json hold the figures of those that are shipped.
#   scripts/train_adapter.sh FOLDER
# Texts: mgam data fetch novels speeches wikipedia essays factbook. Fitted on their TRAIN split; needles, facts and losses
# are of the TEST split, what a policy keeps of the TUNE split.
set -euo pipefail
out=${1:?give a folder}
mkdir -p "$out"
texts=(--data novels --data speeches --data wikipedia --data essays)
needles=(--tasks needle_prose --prose novels --batch-size 20 --keep-out 64,768)

mgam fit "${texts[@]}" --data factbook -o "$out/first" --adapter-only --lora-steps 9000 --lora-minutes 3.2 --questions 24 --quotes 0.25 \
  --seed 1 --json | tee "$out/first.out"
mgam fit "${texts[@]}" --data factbook -o "$out/lookup" --adapter-only --lora-steps 9000 --lora-minutes 3.6 --lora-at-once 2 --questions 24 --quotes 0.25 \
  --alike 0.6 --adapter "$out/first" --lengths 2048,2048,4096,8192 --seed 1 --json | tee "$out/lookup.out"
mgam eval "${needles[@]}" --lengths 8k,16k,32k,64k,128k --trials 60 --results "$out/needles_lookup.jsonl" --methods "mgam,mgam:adapter=$out/lookup"

mgam eval --tasks facts_by_name --prose novels --keep-out 64,768 --lengths 1536,8k,32k --trials 60 --batch-size 6 --results "$out/facts_lookup.jsonl" \
  --methods "dense,mgam:adapter=$out/lookup"

mgam fit "${texts[@]}" -o "$out/policy" --tokens 8192 --steps 3000 --minutes 3 --lookup-tokens 4096 --check 3 --json | tee "$out/policy.out"
mgam eval "${needles[@]}" --lengths 8k,16k,32k,64k --trials 60 --results "$out/needles.jsonl" --methods "mgam,mgam:policy=$out/policy"
python "$(dirname "$0")/../benchmarks/learned.py" - "$out/policy" "$out/losses_policy.jsonl" inside far recall

mgam fit "${texts[@]}" --data factbook -o "$out/adapter" --lora --policy "$out/policy" --lora-steps 9000 --lora-minutes 7 --lora-batch 2 \
  --questions 16 --lengths 6144,12288,24576 --seed 1 --json | tee "$out/adapter.out"
python "$(dirname "$0")/../benchmarks/learned.py" - "$out/adapter" "$out/losses_adapter.jsonl" inside far
mgam eval "${needles[@]}" --lengths 8k,16k,32k,64k --trials 60 --results "$out/needles_adapter.jsonl" --methods "mgam:policy=$out/adapter"
mgam eval --tasks facts_by_name --lengths 1536,32k --trials 60 --batch-size 10 --results "$out/facts.jsonl" \
  --methods "mgam:policy=$out/adapter"
