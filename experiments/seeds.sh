#!/usr/bin/env bash
# A recipe over several seeds, with the random control, and a table of the results.
#
#   experiments/seeds.sh RECIPE OUT_DIR 0 1 2
#
# Kill it anywhere; the same command goes on where it stopped. One run at a time: two heavy jobs on two cores stop each other.
set -euo pipefail
recipe=$1 out=$2
shift 2
for seed in "$@"; do
  run="$out/seed$seed"
  blockem run "$recipe" --out "$run" --seed "$seed"
  blockem block "$recipe" --out "$run" --seed "$seed" --set block.control=random
  blockem evaluate "$recipe" --out "$run" --seed "$seed"
  blockem report "$run"
done
python "$(dirname "$0")/table.py" "$out"/seed*/summary.json
