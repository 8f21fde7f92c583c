"""
Code that the scripts share. The files of this folder need only torch and model.py. The four packages build on them:
text/, weights/, inference/ and training/.

A function that gets bad input ends the script with one line: sys.exit('what was given; what was expected; what to do').
Docstrings call this "exits if ...".

Imports run downwards (tests/test_structure.py): scripts, objectives, training, weights and inference, text, the files
of this folder, model.py, kv_cache.py, kernels.py.
"""
