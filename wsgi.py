"""What gunicorn loads: the one real application, made from the environment."""

from __future__ import annotations

import os

from app import create_app
from heyvm.settings import from_env

app = create_app(from_env(os.environ))
