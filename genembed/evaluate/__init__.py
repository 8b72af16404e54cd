"""Quality on mteb's tasks, the hub's and your own, with every instruction and halting rule on record."""

from importlib import util

from genembed.errors import missing_extra

if util.find_spec("mteb") is None:
    raise missing_extra("evaluate", "mteb")
