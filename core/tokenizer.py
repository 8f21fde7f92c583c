"""The old place of core/text/tokenizer.py, kept for prepare scripts that import it from here."""
import sys

from core.text import tokenizer

sys.modules[__name__] = tokenizer
