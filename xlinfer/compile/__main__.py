import sys

from xlinfer.commands.compile import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
