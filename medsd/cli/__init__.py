"""The `medsd` command: thin verbs over the same functions that the bundles call."""

from __future__ import annotations

import io
import sys
import warnings

from medsd.cli import cohorts, machine, maps, runs
from medsd.cli.app import app
from medsd.errors import MedsdError
from medsd.logs import log_to_terminal

# Importing them gives the command its verbs.
__all__ = ["cohorts", "machine", "main", "maps", "runs"]


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit code 1."""
    log_to_terminal()
    warnings.filterwarnings("ignore", module="PIL")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are no UTF-8
    try:
        app()
    except MedsdError as error:
        print(f"medsd: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except ImportError as error:
        if "cannot open shared object" not in str(error):
            raise
        print(f"medsd: {error}; 'medsd doctor' names the fix", file=sys.stderr)
        raise SystemExit(1) from error
