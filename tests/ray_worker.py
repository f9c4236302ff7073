"""The command of a worker of the session's Ray: asks `ray_forks.py` for a fork instead of this new interpreter."""

import json
import os
import socket
import sys

SOCKET = "RZEN_TEST_FORKS"
_CONTEXT = "--serialized-runtime-env-context="


def main() -> None:
    """Send arguments, environment, folder and open files of this process, and end when the fork has them.

    Become Ray's own worker where Ray wants a command before it, or other modules.
    """
    arguments = sys.argv[1:]
    contexts = [argument.removeprefix(_CONTEXT) for argument in arguments if argument.startswith(_CONTEXT)]
    context = json.loads(contexts[0]) if contexts else {}
    variables = context.get("env_vars", {})
    if context.get("command_prefix") or "PYTHONPATH" in variables:
        setup = os.path.join(os.path.dirname(arguments[0]), "setup_worker.py")  # noqa: PTH118, PTH120
        os.execv(sys.executable, [sys.executable, setup, *arguments])
    request = {
        "arguments": [one for one in arguments if not one.startswith((_CONTEXT, "--language="))],
        "environment": os.environ | {name: os.path.expandvars(value) for name, value in variables.items()},
        "folder": os.getcwd(),  # noqa: PTH109
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1), "the process that forks workers has ended"


if __name__ == "__main__":
    main()
