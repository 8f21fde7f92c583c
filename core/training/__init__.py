"""What train.py uses: settings checks, run folder, checkpoint writer, optimizers, logging, evaluation.
Imports everything else in core/ and model.py.
"""
