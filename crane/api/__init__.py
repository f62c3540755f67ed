"""The HTTP API. `crane.api:app` is one application for WSGI and ASGI servers alike."""

from crane.api.app import App, create_app

__all__ = ["App", "app", "create_app"]

app = create_app()
