#!/usr/bin/env bash
# From scratch to a report: build a model, train it with checkpoints, measure MIR of two of them and compare both.
#
#     bash examples/pretraining.sh [FOLDER]
#
# FOLDER receives all output (default: pretraining-out). STEPS, EVERY and SAMPLES make it shorter or longer; options of
# `mir demo` can be set by variables such as MIR_DEMO_STEPS.
set -euo pipefail
out=${1:-pretraining-out}
steps=${STEPS:-40} every=${EVERY:-20} samples=${SAMPLES:-20}
here=$(cd "$(dirname "$0")" && pwd)

# A model with its processor, pictures and prose.
mir demo --out "$out/demo" --save "$out/model"

# Train it, with MIR in the log and in the plot.
python "$here/train_with_mir.py" "$out/model" --out "$out/training" --steps "$steps" --every "$every" --samples "$samples"

# MIR of the first and the last checkpoint. Trainer saves no processor here, so use that of the initial model.
for step in "$every" "$steps"; do
    mir compute --model "$out/training/checkpoint-$step" --processor "$out/model" \
        --images "$out/model/images" --text "$out/model/prose.jsonl" \
        --samples "$samples" --text-tokens 64 --out "$out/mir/step-$step"
done

mir compare "$out/mir/step-$every" "$out/mir/step-$steps"
mir plot "$out/mir/step-$every" "$out/mir/step-$steps" --out "$out/layers.pdf"
mir report "$out/mir/step-$every" "$out/mir/step-$steps" --out "$out/report.html"
