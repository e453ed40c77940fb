"""For all tests of finetune: what a run needs is counted once for each form of training; that takes most of a short run."""

import pytest

from gradlr.apps.finetune import finetune_cli

_counted = {}


@pytest.fixture(autouse=True)
def _count_once(monkeypatch):
    real = finetune_cli.required_memory

    def remembered(language, *, options, **sizes):
        form = (options["apply"], options["capture"], sizes["dtype"], sizes["is_checkpointed"])
        key = (language.identity(), *form)
        if key not in _counted:
            _counted[key] = real(language, options=options, **sizes)
        return _counted[key]

    monkeypatch.setattr(finetune_cli, "required_memory", remembered)
