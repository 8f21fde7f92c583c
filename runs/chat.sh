#!/usr/bin/env bash
# A model that chats, from nothing but a text and conversations of your own: a tokenizer, pretraining, instruction tuning, a reward model, reinforcement learning.
#
#     bash runs/chat.sh my.txt conversations.jsonl preferences.jsonl [--key=value ...]
#
# The settings that follow are for every train.py. Without preferences ('' or none) it stops after instruction tuning; chat.py --rate collects them.
# What is done stays: start it again and it goes on where it was.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo 'usage: bash runs/chat.sh my.txt conversations.jsonl [preferences.jsonl] [--key=value ...]' >&2
    exit 2
fi
text=$(realpath "$1") conversations=$(realpath "$2") preferences=
shift 2
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
    preferences=${1:+$(realpath "$1")}
    shift
fi
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
name=${NAME:-chat}  # of the folders: data/$name-text, data/$name, out-$name-base, out-$name, ...
vocab_size=${VOCAB_SIZE:-8192}  # of the tokenizer; a short text supports fewer
context=${CONTEXT:-512}

stage() {  # the run's folder and the rest of the command
    local folder=$1
    shift
    if [ ! -e "$folder/weights.pt" ]; then  # which is written at the end of a run
        local go_on=()
        [ ! -e "$folder/ckpt.pt" ] || go_on=(--init_from=resume)
        "$python" train.py "$@" --out_dir="$folder" ${go_on[@]+"${go_on[@]}"}
    fi
}

[ -e "data/$name-text/train.bin" ] || "$python" data/any_text/prepare.py --input="$text" --name="$name-text" --tokenizer=bbpe --vocab_size="$vocab_size"
inputs=(--input="$conversations")
[ -z "$preferences" ] || inputs+=(--input="$preferences")
"$python" data/chat/prepare.py "${inputs[@]}" --tokenizer="data/$name-text" --name="$name" --max_tokens="$context"
stage "out-$name-base" config/train_hongloumeng_bbpe.py --dataset="$name-text" --block_size="$context" "$@"
stage "out-$name" config/sft_chat.py --init_from="out-$name-base" --dataset="$name/sft" --learning_rate=1e-3 --block_size="$context" "$@"
if [ -n "$preferences" ]; then
    stage "out-$name-reward" config/reward_chat.py --init_from="out-$name" --dataset="$name/pairs" --learning_rate=3e-4 --block_size="$context" "$@"
    stage "out-$name-grpo" config/grpo_chat.py --init_from="out-$name" --reference="out-$name" --reward="out-$name-reward" --dataset="$name/prompts" --max_new_tokens=$((context / 4)) \
        --learning_rate=1e-4 --block_size="$context" "$@"
    echo "to talk to it: $python chat.py --out_dir=out-$name-grpo"
else
    echo "to talk to it: $python chat.py --out_dir=out-$name; to collect preferences: --rate=preferences.jsonl"
fi
