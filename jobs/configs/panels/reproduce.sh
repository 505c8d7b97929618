#!/usr/bin/env bash
# The paper's four panels at a size that two cores train, from labelled corpora in ../shared/data to one page: about
# two hours and a half. Started again, it goes on where it stopped. The corpora are not in the repository: see
# docs/comparison.md.
#   bash jobs/configs/panels/reproduce.sh
set -euo pipefail
settings=jobs/configs/panels
runs=./runs/panels
python=${PYTHON:-.venv/bin/python}
declare -A shape=(
  [small]=""
  [base]="--set model.config.d_model=128 --set model.config.d_ff=512 --set model.config.d_kv=32 --set model.config.num_layers=4"
)

train() { # size: pre-trained, then adapted
  # shellcheck disable=SC2086
  "$python" jobs/adapt_backbone.py --config $settings/pretrain.yaml --set run.name="$1" ${shape[$1]}
  "$python" jobs/adapt_backbone.py --config $settings/adapt.yaml --set run.name="$1-adapted" \
    --set model.path="$runs/$1/models/step-003000"
}

compare() { # settings file, run name, model folder, more arguments; what has its results is not asked again
  [ -e "$runs/$2/results.json" ] || "$python" jobs/compare_methods.py --config "$settings/$1" \
    --set run.name="$2" --set model.path="$runs/$3" "${@:4}"
}

"$python" jobs/make_panel_corpora.py ../shared/data "$runs/text"

# One rank each, side by side: models this small gain nothing from two.
OMP_NUM_THREADS=1 train small & small=$!
OMP_NUM_THREADS=1 train base & base=$!
wait $small
wait $base

for size in small base; do
  compare objectives.yaml $size-span-corruption $size/models/step-003000
  compare objectives.yaml $size-sentinel $size/models/step-003000 --set 'defaults.target=<extra_id_0> {label}'
  compare objectives.yaml $size-adapted-100 $size-adapted/models/step-000100
  compare objectives.yaml $size-adapted-300 $size-adapted/models/step-000300
  compare objectives.yaml $size-adapted-1000 $size-adapted/models/step-001000
  compare length_and_init.yaml $size-length-and-init $size-adapted/models/step-001000
done

"$python" jobs/compare_methods.py --join $settings/join.yaml --out $runs/report
