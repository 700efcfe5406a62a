"""Every method on one checkpoint, side by side: `mra-cli compare`."""
