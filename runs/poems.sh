#!/usr/bin/env bash
# Train a model of Tang poems stage by stage, from raw text to a model that prefers verses of five characters:
# pretraining, instruction tuning, a reward model, DPO, GRPO by the reward model, GRPO by a rule.
#
#     bash runs/poems.sh [--quick] [--key=value ...]
#
# It takes about 25 minutes on two CPU cores; --quick trains a small model in four. The runs are in the folders
# out-journey, out-journey-sft, ...: NAME=... chooses another word than journey.
# After each stage whose model generates text, it shows the poem on 春夜喜雨.
# The settings at the end are passed to every train.py.
# After an interruption start it again: stages that are finished are skipped, and the current one is resumed.
set -euo pipefail
if [[ ${1:-} = -h || ${1:-} = --help ]]; then
    sed -n '/^#     bash/s/^#     /usage: /p' "$0"
    exit
fi
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=out-${NAME:-journey}
small=()
if [ "${1:-}" = --quick ]; then
    shift
    out=$out-quick
    small=(--n_layer=3 --n_head=4 --n_embd=96)
    set -- --compile=False "$@"  # compiling would take longer than it saves
    steps=(300 250 30 50 6)
    titles=50
else
    steps=(1200 600 100 150 40)
    titles=200
fi

folders=" $out $out-sft $out-reward $out-dpo $out-grpo $out-grpo-rule "
. runs/stage.sh

judge() {  # writes the poems for some titles and measures them
    "$python" data/tang_poems/judge.py --titles=$titles --out=$out.jsonl "$@"
}

rm -f $out.jsonl
"$python" data/tang_poems/prepare.py
tuned=$out-sft/best.pt

stage 'pretraining: what verse is' $out config/pretrain_poems.py --dataset=tang_poems \
    --max_iters="${steps[0]}" ${small[@]+"${small[@]}"} "$@"
"$python" sample.py --out_dir=$out --num_samples=1 --max_new_tokens=80 --start=$'\n\n春夜喜雨\n'

stage 'instruction tuning: a poem for a title' $out-sft config/sft_poems.py --dataset=tang_poems/sft \
    --max_iters="${steps[1]}" --init_from=$out/best.pt "$@"
judge --out_dir=$out-sft

stage 'a reward model: which poem is better' $out-reward config/reward_poems.py --dataset=tang_poems/pairs \
    --max_iters="${steps[2]}" --init_from=$tuned "$@"

stage 'DPO: towards verses of five characters' $out-dpo config/dpo_poems.py --dataset=tang_poems/pairs \
    --max_iters="${steps[3]}" --init_from=$tuned --reference=$tuned "$@"
judge --out_dir=$out-dpo --reference=$out-sft

stage 'GRPO, by the reward model' $out-grpo config/grpo_poems.py --dataset=tang_poems/prompts \
    --max_iters="${steps[4]}" --init_from=$tuned --reference=$tuned --reward=$out-reward "$@"
judge --out_dir=$out-grpo --reference=$out-sft

stage 'GRPO, by a rule' $out-grpo-rule config/grpo_poems.py --dataset=tang_poems/prompts \
    --max_iters="${steps[4]}" --init_from=$tuned --reference=$tuned --reward=data/tang_poems/poems.py:reward "$@"
judge --out_dir=$out-grpo-rule --reference=$out-sft

echo
echo "done in $((SECONDS / 60)) minutes; to talk to it: $python chat.py --out_dir=$out-dpo"
