"""`python -m blkloom.supervisor`."""

from __future__ import annotations

import gc
import sys

from blkloom.supervisor.zygote_process import start_zygote

gc.disable()  # until all is imported (`command.supervisor`)
zygote = start_zygote()  # imports what it needs meanwhile

from blkloom.supervisor.command import main  # noqa: E402

sys.exit(main(sys.argv[1:], zygote))
