"""``python -m domi_fast`` is the command ``domi``."""

from .cli import main

main()
