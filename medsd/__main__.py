"""`python -m medsd`, where the command `medsd` is not on the path."""

from medsd.cli import main

main()
