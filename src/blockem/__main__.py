"""`python -m blockem`."""

from blockem.cli import main

main()
