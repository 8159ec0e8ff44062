"""A process that races for keys: prints the turns that it won, one JSON list. Started by test_races.py."""

from __future__ import annotations

import json
import sys
import time

from storage.errors import KeyExists
from storage.open import open_store

me, turns, apart_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
target = json.loads(sys.stdin.readline())  # options hold secrets: never on a command line
store = open_store(target["url"], target["options"])
store.put(f"ready/{me}", b"")  # connected
print("ready", flush=True)
begin_s = float(sys.stdin.readline())  # of the monotonic clock, which all processes of a machine share
won = []
for turn in range(turns):
    while time.monotonic() < begin_s + turn * apart_s:
        pass  # all at the same instant, to the microsecond
    try:
        store.put_if_absent(f"log/{turn}", f"by {me} in {turn} ".encode() * 50)
    except KeyExists:
        continue
    won.append(turn)
print(json.dumps(won), flush=True)
