# Sourced by the pipelines in this folder. Runs a stage in the root of the repository, or skips it if it is finished.
#
# A stage writes FOLDER/inputs.txt: the words of its command, with checksums of the files that they name. If these differ
# when the pipeline is started again, the folder was made from something else, and the pipeline stops.
# The pipeline sets `folders`: the folders that it writes, each after those that it is made from, with spaces around them.

trap 'echo "stopped; to go on: the same command again, $0 ..." >&2; exit 130' INT

list_inputs() {  # prints the words of a command, one a line, with the checksum of what a word names
    local word path
    for word in "$@"; do
        path=${word#--*=}
        [[ $word != --dataset=* ]] || path=data/$path
        [[ $word != --reward=*.py:* ]] || path=${path%:*}  # FILE.py:FUNCTION
        echo "$word$(checksum "$path")"
    done
}

checksum() {  # of a file, of the weights of a run, of the tokens of a dataset, or of all files in another folder
    local path=$1
    local only='*'
    [ ! -f "$path/weights.pt" ] || path=$1/weights.pt
    [ ! -f "$path/train.bin" ] || only='*.bin'
    if [ -f "$path" ]; then
        cksum < "$path" | sed 's/^/  /'
    elif [ -d "$path" ]; then
        find "$path" -type f -name "$only" -exec cksum {} + | sort | cksum | sed 's/^/  /'
    fi
}

check_inputs() {  # arguments: folder, its inputs now. Exits unless the folder is new, or was made from these inputs
    local folder=$1
    local inputs=$2
    local changes later
    if [ -e "$folder/inputs.txt" ]; then
        [ "$inputs" != "$(cat "$folder/inputs.txt")" ] || return 0
        changes=$(diff "$folder/inputs.txt" <(echo "$inputs") || true)  # diff exits with 1 where they differ
        changes=$(sed -n 's/^< /before: /p; s/^> /now: /p' <<< "$changes" | head -n 2)
        changes="was made from other inputs (${changes//$'\n'/, })"
    elif [ -e "$folder/ckpt.pt" ] || [ -e "$folder/train.bin" ] || [ -e "$folder/sft" ]; then
        changes='was made by another command'
    else
        return 0
    fi
    later=${folders#* "$folder" }
    echo "$0: $folder $changes; to begin anew: remove it and those made from it by 'rm -rf $folder ${later% }'," \
        "or choose other folders by NAME=..." >&2
    exit 1
}

prepare() {  # arguments: the folder that a prepare.py writes, then the command
    local folder=$1
    local inputs
    shift
    inputs=$(list_inputs "$@")
    check_inputs "$folder" "$inputs"
    if [ ! -e "$folder/inputs.txt" ]; then
        "$python" "$@"
        echo "$inputs" > "$folder/inputs.txt"
    fi
}

stage() {  # arguments: heading, folder of the run, then the arguments of train.py
    local heading=$1
    local folder=$2
    local inputs
    shift 2
    echo
    echo "=== $heading: $folder (after $((SECONDS / 60)) min)"
    inputs=$(list_inputs "$@")
    check_inputs "$folder" "$inputs"
    if [ -e "$folder/weights.pt" ]; then  # written at the end of a run
        echo 'finished before'
        return
    fi
    mkdir -p "$folder"
    echo "$inputs" > "$folder/inputs.txt"
    if [ -e "$folder/ckpt.pt" ]; then
        set -- "$@" --init_from=resume
    fi
    "$python" train.py "$@" --out_dir="$folder"
}
