"""Timing attention and models, exact against approximated: `mra-cli bench`."""
