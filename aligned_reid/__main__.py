"""`python -m aligned_reid` is the command `aligned-reid`."""

from aligned_reid.commands import main

if __name__ == "__main__":
    main()
