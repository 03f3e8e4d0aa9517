#!/usr/bin/env bash
# Measure and draw the images and tables of docs/ and docs/benchmarks/ again, except those of a GPU and of other
# engines. It takes five hours on two idle cores. Jobs that can resume keep their finished parts. Prose that quotes
# numbers is not changed: check it against `git diff`.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
pages=docs/benchmarks
images=data/shapes/images/test

$python jobs/demo.py --fresh true --readme docs/demo.md
cp runs/demo-against-demo-full/comparison.png docs/images/demo.png
for seed in 1 2; do
  again="jobs/finetune.py --config jobs/configs/finetune_demo.yaml --seed $seed --tracking.registered_model null"
  $python $again --name "demo-full-seed-$seed" --skip null
  $python $again --name "demo-seed-$seed"
done
data="--data.train data/shapes-16k/train.json --data.validation data/shapes-16k/validation.json"
longer="jobs/finetune.py --config jobs/configs/finetune_demo.yaml --tracking.registered_model null $data"
$python jobs/make_shapes.py --config jobs/configs/shapes_demo.yaml --output data/shapes-16k --train 16000
$python $longer --name long-full --skip null
$python $longer --name long
taught="$longer --training.objective both --distillation.top_k 64 --distillation.cache true"
$python $taught --name both
$python $taught --name both-seed-1 --seed 1
$python $taught --name both-seed-2 --seed 2
$python $taught --name both-3 --training.epochs 3
$python $longer --name long-3 --training.epochs 3
sized="{retained: 72, skipped: 0, select: diversity, size_bias: true}"
$python $longer --name sized --skip "$sized"
$python $longer --name sized-seed-1 --seed 1 --skip "$sized"
$python $longer --name sized-seed-2 --seed 2 --skip "$sized"
$python jobs/make_shapes.py --config jobs/configs/shapes_demo.yaml --output data/shapes-48k --train 48000
$python ${longer//16k/48k} --name wide
$python -c "
import json
rows = json.load(open('data/shapes-16k/train.json'))
unlabelled = [{**row, 'conversations': row['conversations'][:1]} for row in rows]
json.dump(unlabelled, open('data/shapes-16k/unlabelled.json', 'w'))"
$python ${taught/train.json/unlabelled.json} --name unlabelled --training.objective distill \
  --answering.max_new_tokens 96
$python $taught --name both-divprune \
  --skip "{retained: 74, skipped: 0, summary_tokens: 0, select: diversity, merge: drop}"
where="jobs/finetune.py --config jobs/configs/finetune_demo.yaml --tracking.registered_model null"
$python $where --name drop-4 --skip "{retained: 0.4, skipped: 0.0, select: diversity, drop_after: 4}"
$python $where --name drop-none --skip "{retained: 0.335, skipped: 0.0, select: diversity}"
$python -m skipvision overlay --model models/shapes-llava --adapter runs/demo/adapter $images/000000.png \
  -o docs/images/overlay.png
if command -v prometheus >/dev/null; then $python -m tests.infra.live -o docs/images; fi
$python jobs/analyse.py --config jobs/configs/analyse_demo.yaml --report docs/results
$python jobs/tradeoff.py --config jobs/configs/tradeoff_seeds.yaml --report docs/results
$python jobs/tradeoff.py --config jobs/configs/tradeoff_target.yaml --report docs/results
$python jobs/tradeoff.py --config jobs/configs/tradeoff_objectives.yaml --report docs/results
$python jobs/tradeoff.py --config jobs/configs/tradeoff_layers.yaml --report docs/results
$python jobs/tradeoff.py --config jobs/configs/tradeoff_size_bias.yaml --report docs/results
$python jobs/tradeoff.py --config jobs/configs/tradeoff_by_size.yaml --report docs/results
$python jobs/calibrate.py --config jobs/configs/calibrate_layers.yaml
cp runs/layers/calibration.png docs/results/calibrate_layers.png

$python jobs/deploy.py --config jobs/configs/deploy_demo.yaml &
endpoint=$!  # stopped by TERM: background jobs of a script ignore INT
trap 'kill -TERM $endpoint 2>/dev/null || true' EXIT
until $python -c 'import urllib.request as r; r.urlopen("http://127.0.0.1:8000/healthz")' 2>/dev/null; do
  kill -0 $endpoint
  sleep 1
done
$python -m tests.serve.page_screenshot --image $images/000018.png -o docs/images/page.png
kill -TERM $endpoint
wait $endpoint || true

# Each benchmark table, by the command above it.
grep -rhoE '^`python -m benchmarks[. ][^`]*`' $pages/*.md | tr -d '`' | while read -r _ command; do
  $python $command </dev/null
done
$python -m benchmarks figures
