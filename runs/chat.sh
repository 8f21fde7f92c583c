#!/usr/bin/env bash
# Train a chat model from nothing but a text and your own conversations: tokenizer, pretraining, instruction tuning,
# reward model, reinforcement learning.
#
#     bash runs/chat.sh my.txt conversations.jsonl preferences.jsonl [--key=value ...]
#
# The settings at the end are passed to every train.py.
# Without preferences (none given, or '') it stops after instruction tuning; collect some with chat.py --rate.
# After an interruption start it again: stages that are finished are skipped, and the current one is resumed.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo 'usage: bash runs/chat.sh my.txt conversations.jsonl [preferences.jsonl] [--key=value ...]' >&2
    exit 2
fi
text=$(realpath "$1")
conversations=$(realpath "$2")
preferences=
shift 2
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
    preferences=${1:+$(realpath "$1")}
    shift
fi
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
name=${NAME:-chat}  # of the folders: data/$name-text, data/$name, out-$name-base, out-$name, ...
vocab_size=${VOCAB_SIZE:-8192}  # of the tokenizer; a short text supports fewer ids
context=${CONTEXT:-512}

stage() {  # arguments: folder of the run, then those of train.py
    local folder=$1
    shift
    if [ ! -e "$folder/weights.pt" ]; then  # written at the end of a run
        local resume=()
        [ ! -e "$folder/ckpt.pt" ] || resume=(--init_from=resume)
        "$python" train.py "$@" --out_dir="$folder" ${resume[@]+"${resume[@]}"}
    fi
}

# the text, and the conversations in its tokenizer
if [ ! -e "data/$name-text/train.bin" ]; then
    "$python" data/any_text/prepare.py \
        --input="$text" --name="$name-text" --tokenizer=bbpe --vocab_size="$vocab_size"
fi
inputs=(--input="$conversations")
[ -z "$preferences" ] || inputs+=(--input="$preferences")
"$python" data/chat/prepare.py "${inputs[@]}" --tokenizer="data/$name-text" --name="$name" --max_tokens="$context"

# pretraining
stage "out-$name-base" config/train_hongloumeng_bbpe.py \
    --dataset="$name-text" --block_size="$context" "$@"

# instruction tuning
stage "out-$name" config/sft_chat.py --init_from="out-$name-base" \
    --dataset="$name/sft" --learning_rate=1e-3 --block_size="$context" "$@"

if [ -z "$preferences" ]; then
    echo "to talk to it: $python chat.py --out_dir=out-$name; to collect preferences: --rate=preferences.jsonl"
    exit
fi

# reward model
stage "out-$name-reward" config/reward_chat.py --init_from="out-$name" \
    --dataset="$name/pairs" --learning_rate=3e-4 --block_size="$context" "$@"

# reinforcement learning
stage "out-$name-grpo" config/grpo_chat.py --init_from="out-$name" \
    --reference="out-$name" --reward="out-$name-reward" --dataset="$name/prompts" \
    --max_new_tokens=$((context / 4)) --learning_rate=1e-4 --block_size="$context" "$@"

echo "to talk to it: $python chat.py --out_dir=out-$name-grpo"
