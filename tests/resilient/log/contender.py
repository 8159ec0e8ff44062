"""A process that fights for a run's log: leads, commits, is fenced, leads again. Started by test_races.

Prints a line of JSON for each acknowledged commit, after it was acknowledged.
"""

from __future__ import annotations

import json
import sys
import time

from resilient.errors import Fenced
from resilient.log import Ref, RunLog
from storage.local import LocalStore

root, name, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
log = RunLog(LocalStore(root), base_every=20)
print("ready", flush=True)
sys.stdin.readline()
until_s = time.monotonic() + seconds
attempt = 0
while time.monotonic() < until_s:
    leader = log.lead(name)
    try:
        generation = leader.open_generation(members=1, layout={"data": 1}, source=name)
        opened = leader.view.opened(generation)
        assert opened is not None
        for step in range(opened.restore_step + 1, opened.restore_step + 8):
            attempt += 1
            manifest = Ref(key=f"data/{generation}/{step}/{name}-{attempt}/manifest", hash="0" * 32, size=1)
            slot = leader.commit(generation=generation, step=step, tier="disk", manifest=manifest)
            print(json.dumps({"slot": slot, "step": step, "epoch": leader.epoch, "key": manifest.key}), flush=True)
    except Fenced:
        continue
