"""The trusted core of the night: nothing in this package ever imports train.py."""
