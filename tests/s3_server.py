"""S3 on loopback: moto's server in a process of its own, one request at a time, because its conditions are not atomic."""

import sys
import threading
from collections.abc import Iterable
from typing import Any


def serve() -> None:
    """Serve until killed; the port is printed."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application, one = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def exclusive(environ: Any, start_response: Any) -> Iterable[bytes]:
        with one:
            return list(application(environ, start_response))

    server = make_server("127.0.0.1", 0, exclusive, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(serve())
