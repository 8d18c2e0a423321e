"""`python -m adq_search` is `adq-search`: what `torchrun -m` starts."""

from adq_search.cli import main

if __name__ == "__main__":
    main()
