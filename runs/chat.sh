#!/usr/bin/env bash
# Train a chat model from nothing but a text and your own conversations: tokenizer, pretraining, instruction tuning,
# reward model, reinforcement learning.
#
#     bash runs/chat.sh my.txt conversations.jsonl [preferences.jsonl] [config/laptop.py] [--key=value ...]
#
# It takes 10 to 25 minutes on two CPU cores, by the size of the text, and 10 more with preferences. Without these it
# stops after instruction tuning; collect some with chat.py --rate. Pretraining uses config/own_text.py, overlaid by the
# config files given; the settings at the end are passed to every train.py.
# Three variables may stand before the command. NAME=...: the folders are data/assistant-text, data/assistant,
# out-assistant-base, out-assistant, ..., with this word instead of assistant. VOCAB_SIZE=...: ids of the tokenizer (an
# id for 100 bytes of text, at most 4,096). CONTEXT=...: tokens in a row (256).
# After an interruption start it again: stages that are finished are skipped, and the current one is resumed.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '/^#     bash/s/^#     /usage: /p' "$0" >&2
    exit 2
fi
if [[ $2 = *.txt || $2 = *.md || " $* " = *" --init_from"* ]]; then
    echo "$0: the text comes first, then the conversations; to go on after an interruption: the same command again" >&2
    exit 2
fi
for file in "$1" "$2"; do
    [ -e "$file" ] || { echo "$0: $file: no such file" >&2; exit 1; }
done
text=$(realpath "$1")
conversations=$(realpath "$2")
shift 2
inputs=(--input="$conversations")
overlays=()
preferences=
while [ $# -gt 0 ] && [[ $1 != --* ]]; do
    case $1 in
        *.py) overlays+=("$1") ;;
        '') ;;
        *) [ -e "$1" ] || { echo "$0: $1: no such file" >&2; exit 1; }
           preferences=$(realpath "$1")
           inputs+=(--input="$preferences") ;;
    esac
    shift
done
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
name=${NAME:-assistant}
folders=" data/$name-text out-$name-base data/$name out-$name out-$name-reward out-$name-grpo "
. runs/stage.sh
size=$(find "$text" -type f -exec cat {} + | wc -c)
vocab_size=${VOCAB_SIZE:-$((size > 409600 ? 4096 : size < 30000 ? 300 : size / 100))}
context=${CONTEXT:-256}
echo "10 to 25 minutes on two CPU cores${preferences:+, and 10 more for the preferences}; writes data/$name* and out-$name*"

prepare "data/$name-text" data/any_text/prepare.py \
    --input="$text" --name="$name-text" --tokenizer=bbpe --vocab_size="$vocab_size"
prepare "data/$name" data/chat/prepare.py \
    "${inputs[@]}" --tokenizer="data/$name-text" --name="$name" --max_tokens="$context"

if [ ${#overlays[@]} = 0 ] && [ $# = 0 ] && [ "$(wc -c < "data/$name-text/train.bin")" -lt 6000000 ]; then
    overlays=(--epochs=2)  # a short text: see the table in config/own_text.py
fi
stage 'pretraining' "out-$name-base" config/own_text.py ${overlays[@]+"${overlays[@]}"} \
    --dataset="$name-text" --block_size="$context" "$@"

stage 'instruction tuning' "out-$name" config/sft_chat.py --init_from="out-$name-base" \
    --dataset="$name/sft" --learning_rate=1e-3 --block_size="$context" "$@"

if [ -z "$preferences" ]; then
    echo "to talk to it: $python chat.py --out_dir=out-$name; to collect preferences: --rate=preferences.jsonl"
    exit
fi

stage 'reward model' "out-$name-reward" config/reward_chat.py --init_from="out-$name" \
    --dataset="$name/pairs" --learning_rate=3e-4 --block_size="$context" "$@"

stage 'reinforcement learning' "out-$name-grpo" config/grpo_chat.py --init_from="out-$name" \
    --reference="out-$name" --reward="out-$name-reward" --dataset="$name/prompts" \
    --max_new_tokens=$((context / 4)) --learning_rate=1e-4 --block_size="$context" "$@"

echo "to talk to it: $python chat.py --out_dir=out-$name-grpo"
