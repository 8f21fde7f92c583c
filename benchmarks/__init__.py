"""One file per benchmark, called by bench.py; common.py has what several share. kills.py and elsewhere.py are programs.
run_and_time.py is the process in which bench.py runs a train.py.
Imports everything but the scripts; train.py and data/any_text/prepare.py are started as processes.
"""
