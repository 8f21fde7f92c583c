# Poor Man's Configurator (after nanoGPT's). A script's settings are its module globals. A script runs this file with
#
#     exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())
#
# which overrides them from config files (plain Python) and from `--key=value`, `--key value` or, for True, `--key`,
# in the order given:
#
#     python train.py config/train_shakespeare_char.py --batch_size=32
#
# `--help` prints every setting with its default and the comment on its line. An unknown name or a value of the wrong
# type ends the script with one line that says what was expected. An argument without dashes that does not end in .py is
# the `input` of a script that has this setting (data/*/prepare.py). The script may also define, before that line:
#
#     objective = 'dpo'                           the settings of objectives/dpo.py become settings of the script
#     EXTRA_SETTINGS = ('core.text.prepare',)     so do those of these modules; the script may give one another default
#     OTHER_ARGUMENTS = 'positional'              arguments without -- are not config files; the script finds
#                                                 them in `other_arguments` ('all': unknown --key=value too)
#     SEVERAL_INPUTS = True                       more than one argument without dashes may be given
#
# Afterwards the script has `config` (every setting with its value) and `config_given` ({name: [texts]} of those given
# on the command line; the last text counts, but a script may want them all).
import importlib

importlib.import_module('core.configure').configure(globals())
