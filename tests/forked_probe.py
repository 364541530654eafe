"""Run as a script: prints what it was told, or waits."""

import json
import os
import sys
import time

if sys.argv[1:] == ["wait"]:
    time.sleep(600)
names = ("GIVEN_LATER", "AND_THIS", "PYTHONPATH")
told = {
    "arguments": sys.argv[1:],
    "folder": os.getcwd(),
    "environment": {name: os.environ.get(name) for name in names},
    "name": __name__,
    "input": sys.stdin.read(),
}
print(json.dumps(told))
print("to standard error", file=sys.stderr)
sys.exit(3)
