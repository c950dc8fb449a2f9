"""A process that has imported the libraries once and forks for every command: half of the suite's time was imports.

    python warm.py SOCKET     serves until its stdin closes

The package is not imported here: a fork imports it afresh from the checkout that the command runs in, and `conftest.RECORDER`
notes what it imports and opens. A client that dies takes its fork with it, as a process would die.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
import traceback

LIBRARIES = (
    "torch", "transformers.models.auto.modeling_auto", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.bert.modeling_bert", "transformers.generation.utils", "transformers.trainer", "datasets", "peft",
    "trl.trainer.sft_trainer", "sklearn.linear_model", "sklearn.mixture", "scipy.stats", "scipy.sparse", "pandas", "mlflow",
    "mlflow.data.pandas_dataset", "matplotlib.pyplot", "sae_lens", "jinja2", "pydantic", "evaluate", "dvc.cli.parser",
    "dvc.stage.run", "dvc.utils.hydra", "dvc.repo.experiments.queue.tasks", "dvc.repo.experiments.executor.local", "pygit2",
    "dulwich.porcelain", "networkx", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store",
    "rapidfuzz.process",
)  # fmt: skip


def serve(path: str) -> None:
    """Fork for every client that connects."""
    for name in LIBRARIES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            shutil.rmtree(os.path.dirname(path))
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _work(connection)
        connection.close()


def _work(connection: socket.socket) -> None:
    """Be the client's process: its folder, environment, output; run its script."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    told = json.loads(data)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(told["folder"])
    sys.argv = told["arguments"]
    sys.path[:0] = told["environment"].get("PYTHONPATH", "").split(os.pathsep)
    connection.sendall(f"{os.getpid()}\n".encode())

    def with_the_client() -> None:
        connection.recv(1)
        os.kill(os.getpid(), signal.SIGKILL)

    os.execve = _begin_anew
    threading.Thread(target=with_the_client, daemon=True).start()
    code = 1
    try:
        exec(compile(told["script"], sys.argv[0], "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(f"{code}\n".encode())
        os._exit(code)


def _begin_anew(path: str, arguments: list[str], environment: dict[str, str]) -> None:
    """`python -m inoculation ...` in the place of what runs: imported afresh, from where its PYTHONPATH says."""
    module = arguments[arguments.index("-m") + 1]
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    sys.argv = arguments[arguments.index(module) :]
    runpy.run_module(module, run_name="__main__")
    raise SystemExit(0)


def run(path: str, script: str) -> None:
    """Have the server at `path` run a script as this process would; without a server, return."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        return
    told = {"script": script, "folder": os.getcwd(), "environment": dict(os.environ), "arguments": sys.argv}
    data = json.dumps(told).encode() + b"\n"
    sent = socket.send_fds(connection, [data], [0, 1, 2])
    connection.sendall(data[sent:])
    answers = connection.makefile()
    pid = int(answers.readline())

    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    code = answers.readline()
    os._exit(int(code) if code else 137)


if __name__ == "__main__":
    serve(sys.argv[1])
