"""``python watched.py COMMAND...``: run a command for as long as standard input is open, and end it by SIGTERM then.

Standard input is a pipe that the caller holds. The system closes it when the caller ends, however it ends, so no
compiler outlives the process that wanted it. Ninja passes the signal on to the compilers, each of which has a process
group of its own that no signal from outside reaches.
"""

import os
import subprocess
import sys
from threading import Thread


def main() -> int:
    # SIGPIPE stays ignored, as Python has it: output that nobody reads any more must not end ninja before them.
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, restore_signals=False)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        child.terminate()

    Thread(target=watch, daemon=True).start()
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
