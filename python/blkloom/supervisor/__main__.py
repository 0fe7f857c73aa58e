"""`python -m blkloom.supervisor`."""

from __future__ import annotations

import sys

from blkloom.supervisor.main import main

sys.exit(main(sys.argv[1:]))
