"""Measure where a pretrained transformer's attention can be approximated."""

__version__ = "0.1.0"
