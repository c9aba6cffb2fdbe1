import sys

from xlinfer.commands.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
