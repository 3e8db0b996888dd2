"""`python -m wrenn_sandbox` is the `wrenn` command."""

from wrenn_sandbox.cli.main import main

if __name__ == "__main__":
    main()
