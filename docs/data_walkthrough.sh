#!/usr/bin/env bash
# From raw files in the published formats to a training step that says what it saw, on this machine alone.
#
#     docs/data_walkthrough.sh [FOLDER]        about a minute on 2 cores; FOLDER (demo/walkthrough) keeps what it made
#
# It needs what `make demo` installs. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=${1:-demo/walkthrough}
RAW=$FOLDER/raw STORES=$FOLDER/stores RUN=$FOLDER/run
CONFIG="--config=configs/crystal_small.py --config.data.root=$STORES"

say() { printf '\n== %s\n' "$*"; }
crystal() {
  printf '$ crystal-jax %s\n' "$*"
  "$PYTHON" -m crystal_jax "$@"
}

say "Raw files as published: chunk*/example_*.jsonl.zst and LANGUAGE/*.parquet, of Python's standard library"
"$PYTHON" tests/corpora.py "$RAW" --mb 4

say "A tokenizer with Crystal's control tokens"
crystal tokenizer train --input="$RAW/slimpajama/train/chunk1/*.jsonl.zst" --input=pystd-code --vocab_size=2048 \
  --output="$STORES/tokenizer.json"

say "SlimPajama in one pass: a store for each of its seven sources, whose even and odd files are the published halves"
crystal prepare --source=slimpajama --input="$RAW/slimpajama" --name=slimpajama --tokenizer="$STORES/tokenizer.json" \
  --output="$STORES"

say "StarCoder, its metadata as control tokens; then the four languages of phase 3, each as a source of its own"
crystal prepare --source=starcoder --input="$RAW/starcoder" --name=starcoder --tokenizer="$STORES/tokenizer.json" \
  --output="$STORES"
for language in css html javascript python; do
  crystal prepare --source=starcoder --input="$RAW/starcoder" --languages=$language --name=starcoder_$language \
    --tokenizer="$STORES/tokenizer.json" --output="$STORES"
done

say "The recipe over these stores: the published shares, halves, tenths and FIM rates"
crystal recipe show $CONFIG

say "Ten steps through all three phases"
crystal train $CONFIG --run_dir="$RUN"

say "What step 4 saw: sources, documents, spans, epochs, FIM, text; computed again and compared with the logged hash"
crystal inspect --run_dir="$RUN" --step=4 --text=40 | head -n 40

say "What each source has given, beside its share"
crystal inspect --run_dir="$RUN" --counts

say "A document of that step, found again: every step, slot and epoch that saw it"
DOCUMENT=$("$PYTHON" -m crystal_jax inspect --run_dir="$RUN" --step=4 --json |
  "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["sequences"][0]["parts"][0]["document"])')
crystal inspect --run_dir="$RUN" --document="$DOCUMENT"

say "One bit of one file is flipped, and verify names the file and the block"
BROKEN=slimpajama/C4/train/00001.tokens
"$PYTHON" - "$STORES/$BROKEN" <<'PYTHON'
import sys

with open(sys.argv[1], "r+b") as file:
    file.seek(1000)
    byte = file.read(1)[0]
    file.seek(1000)
    file.write(bytes([byte ^ 1]))
PYTHON
if crystal verify "$STORES/slimpajama/C4"; then
  echo "verify found nothing" >&2
  exit 1
fi

say "Training with checksums stops at the block, with exit code 4: no restart would help"
code=0
crystal train $CONFIG --config.data.check_blocks=true --run_dir="$FOLDER/checked" || code=$?
test $code = 4

say "Mended: only that input is prepared again, elsewhere; the same input gives the same bytes"
crystal prepare --source=slimpajama --input="$RAW/slimpajama" --name=slimpajama --tokenizer="$STORES/tokenizer.json" \
  --output="$FOLDER/mended" --shard=1/6
cp "$FOLDER/mended/$BROKEN" "$STORES/$BROKEN"
crystal verify "$STORES/slimpajama/C4"

say "All of it lies in $FOLDER"
