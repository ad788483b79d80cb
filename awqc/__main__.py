"""``python -m awqc``."""

from awqc.cli.main import run

run()
