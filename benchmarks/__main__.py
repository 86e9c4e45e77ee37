"""make bench: what memory costs (seconds to minutes). `make bench ARGS="remember_colour seed=0,1"`: what it learns."""

import sys

from benchmarks import memory_cost, remember_colour

COMMANDS = {"memory_cost": memory_cost.main, "remember_colour": remember_colour.main}


def main(words: list[str]) -> int:
    name = words[0] if words and "=" not in words[0] else "memory_cost"
    if name in ("-h", "--help", "help"):
        print("\n\n".join(f"{other}: {sys.modules[command.__module__].__doc__}" for other, command in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        print(f"error: the benchmark must be one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        return 2
    return COMMANDS[name](words[1:] if words and "=" not in words[0] else words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
