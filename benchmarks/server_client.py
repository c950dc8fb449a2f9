"""Requests a second that the stages' client makes of a vLLM server, over its transport and over httpx; for docs/performance.md.

    python benchmarks/server_client.py [at_once]

The server is a process of its own that speaks the protocol and answers at once, 128 tokens to a prompt of 60: what is timed is
the client, on one core. No model, a quarter of a minute.
"""

import argparse
import asyncio
import json
import random
import time
from contextlib import suppress
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection

from openai import AsyncOpenAI

from inoculation import lm, server

REQUESTS, PROMPT, NEW = 1024, 60, 128


def instant(told: Connection) -> None:
    """Answer every request at once; the port goes to `told`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):  # the client is done
            while head := await reader.readuntil(b"\r\n\r\n"):
                lengths = [
                    line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
                ]
                await reader.readexactly(int(lengths[0]) if lengths else 0)
                answer = {"data": [{"id": "m", "root": "m"}]}
                if head.startswith(b"POST"):
                    choice = {
                        "text": "a" * 4 * NEW,
                        "finish_reason": "length",
                        "token_ids": list(range(1000, 1000 + NEW)),
                    }
                    answer = {"id": "x", "object": "text_completion", "model": "m", "choices": [choice]}
                body = json.dumps(answer).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
                    + body
                )
                await writer.drain()

    async def main() -> None:
        listening = await asyncio.start_server(handle, "127.0.0.1", 0)
        told.send(listening.sockets[0].getsockname()[1])
        await listening.serve_forever()

    asyncio.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("at_once", nargs="?", type=int, default=256, help="requests in flight (default: %(default)s)")
    at_once = parser.parse_args().at_once
    here, there = Pipe()
    process = Process(target=instant, args=(there,), daemon=True)
    process.start()
    address, limits = f"http://127.0.0.1:{here.recv()}/v1", server.QUICK.model_copy(update={"timeout": 60.0})
    rng, rates = random.Random(0), {}
    prompts = [[rng.randrange(5, 1000) for _ in range(PROMPT)] for _ in range(REQUESTS)]
    for transport in ("httpx", "own"):
        with server.serving(address, lm.ModelRef(model="m"), None, limits, at_once) as served:
            if transport == "httpx":
                served._runner.run(served._client.close())
                served._client = AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=limits.timeout)
            served.sample(prompts[:64], 1.0, 0, NEW, set())
            start = time.process_time()
            served.sample(prompts, 1.0, 1, NEW, set())
            rates[transport] = REQUESTS / (time.process_time() - start)
    print(json.dumps({"at_once": at_once, "requests_per_cpu_second": rates, "ratio": rates["own"] / rates["httpx"]}))
    process.terminate()


if __name__ == "__main__":
    main()
