"""One file per benchmark, called by bench.py --what=<name>. May import everything but the scripts.
"""
