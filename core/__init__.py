"""Shared by the scripts. Files here need only torch and model.py; text/, weights/, inference/ and training/ build on them.

Every function of core/ that meets bad input ends the script with one line: sys.exit('what was given; what was expected; what to do').
Imports run one way: scripts, objectives, training, inference and weights, text, the files of this folder, model.py, kernels.py.
"""
