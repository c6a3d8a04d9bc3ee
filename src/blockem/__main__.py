"""`python -m blockem`."""

from blockem.cli import main

if __name__ == "__main__":  # a comparison's own processes read this file too
    main()
