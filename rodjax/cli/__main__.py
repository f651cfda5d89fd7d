"""`python -m rodjax.cli`."""

from rodjax.cli import main

if __name__ == "__main__":
    main()
