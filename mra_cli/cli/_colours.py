"""Colours of verdicts, wherever they are printed."""

COLOURS = {"patch": "green", "yes": "green", "with care": "yellow", "no": "red", "refused": "red"}
