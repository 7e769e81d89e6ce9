"""`python -m roundwise`."""

from roundwise.cli import main

main()
