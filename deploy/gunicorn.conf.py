"""`gunicorn -c deploy/gunicorn.conf.py wsgi:app` is the server that `heyvm --api` starts.

What it says lies in heyvm/serving.py, so that an installed heyvm has it too. Set anything of
gunicorn's below, or on its command line.
"""

from heyvm.serving import *  # noqa: F403
