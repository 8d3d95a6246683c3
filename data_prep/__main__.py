"""`python -m data_prep`."""

import sys

from data_prep.cli import main

main(sys.argv[1:])
