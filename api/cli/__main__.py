"""`python -m api.cli`: the `forebay` command without its console script."""

from __future__ import annotations

from api.cli import main

main(prog_name="forebay")
