"""``python -m mra_cli``."""

from mra_cli.cli.main import main

main()
