"""`python -m acttail` is the same as `acttail`."""

from acttail.cli import main

main()
