"""Start script of the guest agent: works with an isolated interpreter (`python3 -I -S main.py`).

`main.py archive` is the program for archives that the agent starts.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    if sys.argv[1:2] == ["archive"]:
        from wrenn_agent import archive

        sys.exit(archive.main(sys.argv[2:]))

    from wrenn_agent.app import main

    sys.exit(main(sys.argv[1:]))
