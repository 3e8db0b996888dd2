"""Start script of the guest agent: works with an isolated interpreter (`python3 -I -S main.py`)."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from wrenn_agent.app import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
