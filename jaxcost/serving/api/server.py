"""The process around the application: it listens, writes its log, and goes when it is told to."""

from __future__ import annotations

import logging
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI


class _Server(uvicorn.Server):
    """Says that it is not ready as soon as it is told to stop, and ends what it has accepted."""

    def handle_exit(self, sig, frame):
        # uvicorn's own would also raise the signal again at the end, so that a good end would look like a death.
        self.config.app.state.draining = True
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def serve(app: FastAPI, host: str, port: int, drain_seconds: float = 60.0) -> None:
    """Serves until SIGTERM or SIGINT, then ends the requests that were accepted.

    Raises:
      ValueError: the address cannot be listened at.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ValueError(f"{host}:{port} cannot be listened at ({error}); name another --host or --port.") from None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("jaxcost.serving")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    options = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": drain_seconds}
    print(f"serving at http://{host}:{listening.getsockname()[1]}", flush=True)
    _Server(uvicorn.Config(app, **options)).run(sockets=[listening])
