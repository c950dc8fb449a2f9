"""The LLM client under faults: 2,000 judge calls to a loopback server that answers in 0.5 s.

    python benchmarks/llm_client.py

Prints the wall time of a faultless run, of one with 5 % 429, 2 % 500, 1 % resets and 1 % hangs, their ratio, the time of
the same calls from the cache, and how many calls a kill -9 half-way sends twice.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from openai_server import Server, serve  # noqa: E402

from inoculation.judge.llm import CITING, YES_NO, Item, judge  # noqa: E402
from inoculation.llm import Client  # noqa: E402
from inoculation.roles import Limits, Role  # noqa: E402

CALLS, CONCURRENCY, LATENCY = 2000, 50, 0.5
FAULTS = {"429": 0.05, "500": 0.02, "reset": 0.01, "hang": 0.01}


def run(url: str, cache: Path) -> tuple[float, list[object]]:
    role = Role(method="llm", model="openai/judge", api_base=url)
    limits = Limits(concurrency=CONCURRENCY, attempts=6, timeout=120, patience=900, budget=20, failures=0.02, tracing=False,
                    prices={"openai/judge": [0.4, 1.6]})  # fmt: skip
    items = [Item(CITING, YES_NO, f"Question {i}?", f"Answer {i}, with pain and fear." * (i % 2)) for i in range(CALLS)]
    started = time.monotonic()
    scores = judge(Client("judge", role, limits, cache), items)
    return time.monotonic() - started, scores


def timed(faults: dict[str, float], folder: Path, name: str) -> tuple[float, list[object]]:
    with serve(Server(latency=LATENCY, faults=faults)) as server:
        seconds, scores = run(server.url, folder / name)
        assert len(server.answered) == CALLS and len(scores) == CALLS, "every call is answered"
        assert max(server.answered.values()) == 1, "and answered once"
        sent = len(server.requests)
        again, same = run(server.url, folder / name)
        assert same == scores and len(server.requests) == sent, "the cache sends nothing"
        print(f"{name}: {seconds:.1f} s for {sent} requests; again from the cache: {again:.2f} s")
        return seconds, scores


def killed(folder: Path) -> None:
    with serve(Server(latency=LATENCY)) as server:
        command = [sys.executable, str(HERE), "--child", server.url, str(folder / "killed")]
        child = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
        while len(server.requests) < CALLS // 2:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        run(server.url, folder / "killed")
        twice = sum(count - 1 for count in server.answered.values())
        assert len(server.answered) == CALLS and len(server.requests) - CALLS <= CONCURRENCY
        print(
            f"kill -9 after {CALLS // 2} requests, then again: {len(server.requests) - CALLS} requests more than calls, "
            f"{twice} answered twice (in flight at most: {CONCURRENCY})"
        )


if __name__ == "__main__":
    if "--child" in sys.argv:
        run(sys.argv[2], Path(sys.argv[3]))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        with serve(Server()) as warm:
            run(warm.url, run_dir / "warm-up")
        faultless, expected = timed({}, run_dir, "faultless")
        faulty, scores = timed(FAULTS, run_dir, "5 % 429, 2 % 500, 1 % reset, 1 % hang")
        assert scores == expected, "the same scores, whatever happened on the way"
        print(f"ratio: {faulty / faultless:.2f}")
        killed(run_dir)
