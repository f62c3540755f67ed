"""The HTTP API. `crane.api:app` is one application for WSGI and ASGI servers alike."""

import sys

from crane.api.app import App, create_app

__all__ = ["App", "app", "create_app"]

if "gunicorn" in sys.modules:
    from crane.api.worker import install

    install()

app = create_app()
