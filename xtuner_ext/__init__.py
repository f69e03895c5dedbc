"""Distils Transformer vision-language models into linear-time and hybrid Mamba-2 ones.

Nothing is imported here: every Python start in an environment that holds this package
reads this file (see `xtuner_ext.autoload`).
"""

__version__ = "0.1.0"
