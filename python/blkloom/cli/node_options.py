"""Options that several verbs have for nodes; imports nothing that such a verb does not need."""

from __future__ import annotations

import click

no_scan_option = click.option(
    "--no-scan", is_flag=True, help="udev does not look what is on the node: no LVM, MD or btrfs of it is activated."
)
