"""The package in other people's programs: what it leaves behind, and whom it disturbs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.ray_script import output_of

pytestmark = [pytest.mark.ray, pytest.mark.long]

HOST = """
import asyncio, faulthandler, hashlib, io, json, logging, os, pathlib, signal, sys, threading, time
import warnings
import psutil, torch, ray, ray.data, scipy.optimize, scipy.sparse, aiohttp.web
from pds_ray import configure, distill, load_distilled, recipe
from pds_ray.distributed import session
from pds_ray.errors import UserError

folder = pathlib.Path(FOLDER, "My Drive", "Jürgen 図")  # in labels of metrics, too
real_start = session.start
said = {}

def config(name, **changes):
    fixed = {"source": "scenes:60:0:0:30", "pairs": 8, "decode.decoder": "nearest",
             "ray.num_cpus": 2, "ray.object_store_gib": 0.1, "out": str(folder / name)}
    return configure(recipe("demo"), {**fixed, **changes})

def state():
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "threads": torch.get_num_threads(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "filters": sorted(map(str, warnings.filters)),  # a library that is imported moves its own
        "traces": faulthandler.is_enabled(),
        "levels": {name: (log.level, list(log.handlers))
                   for name, log in logging.root.manager.loggerDict.items()
                   if isinstance(log, logging.Logger) and name in known},
        "root": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "output": (sys.stdout, sys.stderr),
    }

def rays():
    gone = []
    for _ in range(100):  # they are told to end, and do
        gone = [p.name() for p in psutil.Process().children(recursive=True) if "ray" in p.name()]
        if not gone:
            break
        time.sleep(0.1)
    return gone

def manifest(name):
    return hashlib.sha256((folder / name / "distilled/manifest.json").read_bytes()).hexdigest()

def check(what):
    changed = [name for name, value in state().items() if value != before[name]]
    said[what] = [changed, rays(), ray.is_initialized()]

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start jobs that ignore it
known = set(logging.root.manager.loggerDict)
before = state()

# from a thread, and a second run beside it
started = threading.Event()
def start_and_tell(*args):
    started.set()
    return real_start(*args)
session.start = start_and_tell
thread = threading.Thread(target=distill, args=(config("thread"),))
thread.start()
started.wait()
try:
    distill(config("other"))
except UserError as error:
    said["refused"] = str(error)
thread.join()
check("thread")

# interrupted, in the main thread
def interrupt():
    started.wait()
    os.kill(os.getpid(), signal.SIGINT)
started.clear()
threading.Thread(target=interrupt).start()
try:
    distill(config("notebook"))
except KeyboardInterrupt:
    said["raised"] = "KeyboardInterrupt"
check("interrupted")

# in a notebook: a loop is running, and output is no file
class Cell:
    def __init__(self):
        self.text = ""
    def write(self, text):
        self.text += text
        return len(text)
    def flush(self):
        pass

async def notebook():
    ticks = []
    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)
    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.05)
    cell, (out, err) = Cell(), (sys.stdout, sys.stderr)
    sys.stdout = sys.stderr = cell
    try:
        distill(config("notebook"))
        await asyncio.to_thread(distill, config("again"))
    finally:
        sys.stdout, sys.stderr = out, err
    seen = len(ticks)
    await asyncio.sleep(0.05)
    said["alive"] = len(ticks) > seen and not ticking.done()
    ticking.cancel()
    return cell.text
said["cell"] = "shards" in asyncio.run(notebook())
check("notebook")
said["same"] = manifest("thread") == manifest("notebook") == manifest("again")

# beside a Ray of the program's own
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
value = ray.put("mine")
distill(config("guest"))
said["guest"] = [ray.is_initialized(), ray.get(value), manifest("guest") == manifest("thread")]
print(json.dumps(said))
"""


def test_a_program_around_runs_stays_as_it_was(tmp_path: Path) -> None:
    (line,) = output_of(f"FOLDER = {str(tmp_path)!r}\n{HOST}")[-1:]
    said = json.loads(line)
    as_before = [[], [], False]
    assert said.pop("refused").startswith("another thread of this process is at work on a run")
    assert said.pop("raised") == "KeyboardInterrupt"
    assert said == {
        "thread": as_before,
        "notebook": as_before,
        "alive": True,
        "cell": True,
        "same": True,
        "guest": [True, "mine", True],
        "interrupted": as_before,
    }
