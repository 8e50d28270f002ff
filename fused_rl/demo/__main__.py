"""`python -m fused_rl.demo`, which torchrun can start too, is `fused-rl demo`."""

import argparse
import sys

from fused_rl.demo import command
from fused_rl.system.commands import status_of


def main() -> int:
    name = "python -m fused_rl.demo"
    parser = argparse.ArgumentParser(prog=name, argument_default=argparse.SUPPRESS)
    command.add_options(parser)
    arguments = parser.parse_args()
    return arguments.command(arguments)


if __name__ == "__main__":
    sys.exit(status_of(main))
