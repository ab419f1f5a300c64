"""Print as many lines as the body says, to both streams, and one very long one without an end."""

import sys


def handle(data, context):
    if data is None:
        return None
    for item in data:
        for number in range(int(item["body"])):
            print(f"line {number} " + "x" * 80)
            print(f"error {number}", file=sys.stderr)
        sys.stdout.write("y" * 100_000)
        sys.stdout.flush()
    return [b"done" for _ in data]
