#!/usr/bin/env bash
# The three-phase strategy tried against two others, with several seeds each; docs/strategy.md says what came out here.
#
#     docs/strategy.sh [FOLDER [STEPS]]      about 85 CPU-minutes for 1,500 steps; FOLDER keeps all of it
#
# It needs what `make demo` installs. PYTHON names another interpreter, SEEDS other seeds. FOLDER is runs/strategy unless
# given. The same command goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=${1:-runs/strategy}
STEPS=${2:-1500}
SEEDS=${SEEDS:-1 2 3}
DATA=$FOLDER/data TOKENIZER=$FOLDER/data/tokenizer.json
VARIANTS="three_phases uniform code_after_text"

say() { printf '\n== %s\n' "$*"; }
crystal() {
  printf '$ crystal-jax %s\n' "$*"
  "$PYTHON" -m crystal_jax "$@"
}

say "The standard library's code and its prose, 5% of the modules held out of both"
test -e "$TOKENIZER" ||
  crystal tokenizer train --input=pystd-code --input=pystd-text --vocab_size=4096 --output="$TOKENIZER"
for kind in pystd-code pystd-text; do
  crystal prepare --source=$kind --name=$kind --tokenizer="$TOKENIZER" --output="$DATA" --heldout=0.05
done

say "Three orders of the same tokens"
for variant in $VARIANTS; do
  crystal recipe show --config="configs/strategy.py:$variant-$STEPS" --config.data.root="$DATA"
done

say "A run of each for each seed, of the parameters and of the data"
for seed in $SEEDS; do
  for variant in $VARIANTS; do
    crystal train --config="configs/strategy.py:$variant-$STEPS" --config.data.root="$DATA" \
      --config.training.seed="$seed" --config.data.seed="$seed" --run_dir="$FOLDER/$variant/seed$seed"
  done
done

say "Bits per byte and infilling at the end of each phase"
for run in "$FOLDER"/*/seed*; do
  crystal evaluate --checkpoint="$run" --all --tasks=losses,infilling
done

say "Each seed's runs on the same axes; then means over the seeds, and their spread"
for seed in $SEEDS; do
  crystal report --compare "$FOLDER"/{three_phases,uniform,code_after_text}/seed"$seed" --output="$FOLDER/seed$seed"
done
"$PYTHON" -m benchmarks.strategy "$FOLDER" --output="$FOLDER/curves.png" | tee "$FOLDER/table.md"

say "All of it lies in $FOLDER"
