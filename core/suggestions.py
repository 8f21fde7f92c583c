"""What an unknown name or argument of a script probably stands for; for the error messages of configure.py."""
import difflib
import os

from core.files import find, quoted

# What other programs call our settings. The first line that has the name and whose setting the script has is suggested.
FOREIGN_NAMES = {
    'to': 'output output_dir output_file outfile o save_dir',
    'out': 'output output_file outfile o',
    'out_dir': 'output_dir output o save_dir checkpoint_dir ckpt_dir run run_dir model_dir logdir log_dir',
    'init_from=resume': 'resume resume_training continue',
    'init_from': 'model model_path model_name model_name_or_path m pretrained checkpoint checkpoint_path '
                 'ckpt ckpt_path load load_from resume_from resume_from_checkpoint base_model weights',
    'start': 'prompt text p input question message starts',
    'prompt': 'start text p input question message',
    'prompts': 'file prompt_file f',
    'dataset': 'data data_dir data_path dataset_path dataset_name dataset_dir train_data train_file input text file d',
    'data': 'dataset data_dir data_path dataset_path dataset_name dataset_dir input text file d f',
    'input': 'text file data data_dir data_path dataset dataset_path input_file input_dir i f',
    'tokenizer': 'tokenizer_path tokenizer_name tokenizer_file tokenizer_name_or_path vocab',
    'val_fraction': 'val_split val_size test_size val_ratio split',
    'learning_rate': 'lr max_lr peak_lr',
    'min_lr': 'lr_min final_lr end_lr',
    'epochs': 'epoch num_epochs n_epochs num_train_epochs max_epochs e',
    'max_iters=...': 'epochs epoch num_epochs n_epochs num_train_epochs max_epochs e',  # not the same number
    'max_iters': 'steps max_steps num_steps n_steps train_steps total_steps iters num_iters num_iterations iterations',
    'warmup_iters': 'warmup warmup_steps num_warmup_steps',
    'schedule': 'scheduler lr_scheduler lr_scheduler_type lr_schedule',
    'optimizer': 'optim opt',
    'weight_decay': 'wd',
    'beta1': 'adam_beta1',
    'beta2': 'adam_beta2',
    'ema': 'ema_decay use_ema model_ema averaging',
    'grad_clip': 'clip max_grad_norm grad_norm clip_grad gradient_clip gradient_clip_val clip_grad_norm',
    'batch_size': 'bs b batch micro_batch_size train_batch_size device_batch_size per_device_train_batch_size '
                  'per_device_eval_batch_size eval_batch_size',
    'gradient_accumulation_steps': 'gradient_accumulation grad_accum grad_accum_steps accumulation_steps '
                                   'accumulate_grad_batches accum_steps accum ga',
    'block_size': 'context context_length context_size ctx ctx_size c seq_len seq_length sequence_length max_seq_len '
                  'max_seq_length max_length max_position_embeddings n_ctx n_positions window',
    'max_new_tokens': 'max_tokens max_length length num_tokens n_tokens new_tokens n_predict predict n tokens',
    'max_tokens': 'max_length max_seq_len max_seq_length block_size context_length',
    'n_layer': 'num_layers n_layers num_hidden_layers layers depth',
    'n_head': 'num_heads n_heads num_attention_heads heads',
    'n_kv_head': 'num_kv_heads n_kv_heads num_key_value_heads kv_heads',
    'n_embd': 'hidden_size hidden_dim d_model dim n_embed embed_dim embedding_dim embedding_size emb_dim width',
    'n_inner': 'intermediate_size ffn_dim d_ff ffn_hidden_size',
    'activation': 'hidden_act act activation_function',
    'num_samples': 'num_return_sequences samples n_samples num_outputs',
    'temperature': 'temp t',
    'repetition_penalty': 'repeat_penalty',
    'interactive': 'i chat',
    'system': 'system_prompt sys',
    'serve': 'server api web',
    'eval_interval': 'eval_steps eval_every eval_freq evaluation_steps val_interval',
    'log_interval': 'log_steps log_every logging_steps',
    'save_interval': 'save_steps save_every checkpoint_interval checkpoint_every',
    'keep_last': 'save_total_limit',
    'wandb_log': 'wandb use_wandb',
    'tensorboard_log': 'tensorboard tb',
    'lora_rank': 'lora_r rank r lora',
    'quantize_base': 'qlora load_in_8bit load_in_4bit',
    'dtype=bfloat16': 'bf16',
    'dtype=float16': 'fp16 half',
    'dtype=float32': 'fp32',
    'dtype=int8': 'int8 load_in_8bit',
    'dtype': 'precision torch_dtype mixed_precision amp',
    'device=cpu': 'cpu no_cuda use_cpu',
    'device=cuda': 'gpu cuda',
    'quant': 'quantize quantization outtype q dtype',
    'seed': 's random_seed',
}
RUN_FILES = {'ckpt.pt': 'out_dir', 'best.pt': 'out_dir', 'weights.pt': 'out_dir', 'config.json': 'init_from'}


def meant_by_name(name, value, settings):
    """
    Return the option that an unknown name on the command line stands for, ready to paste, or ''.
    value: the text given with it, or None. settings: {name: Setting} of the script.
    """
    meant = known_name(name, settings)
    is_switch = meant in settings and type(settings[meant].default) is bool
    if not meant or '=' in meant or (is_switch and value is None):
        return meant and f'--{meant}'
    return f'--{meant}=...' if value is None else f'--{meant}={quoted(value)}'


def known_name(name, settings):
    """Return the setting that an unknown name stands for, or 'setting=value', or ''."""
    name = name.replace('-', '_').lower()
    if name in settings:
        return name
    for ours, names in FOREIGN_NAMES.items():
        if ours.partition('=')[0] in settings and name in names.split():
            return ours
    negated = name.removeprefix('no_')
    if negated in settings and type(settings[negated].default) is bool:
        return f'{negated}=False'
    near = difflib.get_close_matches(name, settings, 1)
    return near[0] if near else ''


def meant_by_argument(argument, settings):
    """Return what an argument without dashes may stand for in a script without the setting `input`, or ''."""
    name = quoted(argument)
    for file, key in RUN_FILES.items():
        if key in settings and os.path.exists(os.path.join(find(argument), file)):
            return f'--{key}={name}'
    is_dataset = any(os.path.isdir(find(folder)) for folder in (argument, os.path.join('data', argument)))
    if os.path.isfile(find(f'{argument}.py')):
        return f'{argument}.py'
    if argument.endswith('.pt') and 'ckpt' in settings:
        return f'--ckpt={name}'
    if is_dataset and 'dataset' in settings:
        return f'--dataset={name}'
    if os.path.exists(find(argument)) and 'dataset' in settings:
        return f'python data/any_text/prepare.py {name}, which makes a dataset of a text, and then --dataset=...'
    if 'data' in settings:
        return f'--data={name}'
    if os.path.isfile(find(argument)) and 'start' in settings:
        return f'--start=FILE:{name}'
    return ''
