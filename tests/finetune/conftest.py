"""finetune needs Python 3.11, as TRL does: on 3.10 its own tests are left out, but for those of the data."""

import importlib.util

if importlib.util.find_spec("trl") is None:
    collect_ignore = ["test_command.py", "test_resume.py", "test_torchrun.py"]
