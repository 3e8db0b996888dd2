"""`python3 -m wrenn_agent`."""

import sys

from .app import main

sys.exit(main(sys.argv[1:]))
