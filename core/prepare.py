"""The old place of core/text/prepare.py, kept for prepare scripts that import it from here."""
import sys

from core.text import prepare

sys.modules[__name__] = prepare
