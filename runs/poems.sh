#!/usr/bin/env bash
# Train a model of Tang poems stage by stage, from raw text to a model that prefers verses of five characters:
# pretraining, instruction tuning, a reward model, DPO, GRPO by the reward model, GRPO by a rule.
#
#     bash runs/poems.sh [--quick] [--key=value ...]
#
# It takes about 25 minutes on two CPU cores; --quick trains a small model in four.
# After each stage whose model generates text, it shows the poem on 春夜喜雨.
# The settings at the end are passed to every train.py.
# After an interruption start it again: stages that are finished are skipped, and the current one is resumed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=out-poems
small=()
if [ "${1:-}" = --quick ]; then
    shift
    out=out-poems-quick
    small=(--n_layer=3 --n_head=4 --n_embd=96)
    set -- --compile=False "$@"  # compiling would take longer than it saves
    steps=(300 250 30 50 6)
    titles=50
else
    steps=(1200 600 100 150 40)
    titles=200
fi
started=$SECONDS

stage() {  # arguments: heading, folder of the run, its steps, its config, other settings of train.py
    local heading=$1
    local folder=$2
    local max_iters=$3
    local config=$4
    shift 4
    echo
    echo "=== $heading ($(((SECONDS - started) / 60)) min)"
    if [ ! -e "$folder/weights.pt" ]; then  # written at the end of a run
        local resume=()
        [ ! -e "$folder/ckpt.pt" ] || resume=(--init_from=resume)
        "$python" train.py "$config" --out_dir="$folder" --max_iters="$max_iters" "$@" ${resume[@]+"${resume[@]}"}
    fi
}

judge() {  # writes the poems for some titles and measures them
    "$python" data/tang_poems/judge.py --titles=$titles --out=$out-journey.jsonl "$@"
}

rm -f $out-journey.jsonl
"$python" data/tang_poems/prepare.py

stage 'pretraining: what verse is' $out "${steps[0]}" config/pretrain_poems.py ${small[@]+"${small[@]}"} "$@"
"$python" sample.py --out_dir=$out --num_samples=1 --max_new_tokens=80 --start=$'\n\n春夜喜雨\n'

stage 'instruction tuning: a poem for a title' $out-sft "${steps[1]}" config/sft_poems.py \
    --init_from=$out/best.pt "$@"
judge --out_dir=$out-sft

stage 'a reward model: which poem is better' $out-reward "${steps[2]}" config/reward_poems.py \
    --init_from=$out-sft/best.pt "$@"

stage 'DPO: towards verses of five characters' $out-dpo "${steps[3]}" config/dpo_poems.py \
    --init_from=$out-sft/best.pt --reference=$out-sft/best.pt "$@"
judge --out_dir=$out-dpo --reference=$out-sft

stage 'GRPO, by the reward model' $out-grpo "${steps[4]}" config/grpo_poems.py \
    --init_from=$out-sft/best.pt --reference=$out-sft/best.pt --reward=$out-reward "$@"
judge --out_dir=$out-grpo --reference=$out-sft

stage 'GRPO, by a rule' $out-grpo-rule "${steps[4]}" config/grpo_poems.py \
    --init_from=$out-sft/best.pt --reference=$out-sft/best.pt --reward=data/tang_poems/poems.py:reward "$@"
judge --out_dir=$out-grpo-rule --reference=$out-sft

echo
echo "done in $(((SECONDS - started) / 60)) minutes; to talk to it: $python chat.py --out_dir=$out-dpo"
