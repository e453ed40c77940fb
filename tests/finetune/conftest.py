"""For all tests of finetune: what a run needs is counted once for each size, which takes most of a short run's time."""

import pytest

from gradlr.apps.finetune import finetune_cli

_counted = {}


@pytest.fixture(autouse=True)
def _count_once(monkeypatch):
    real = finetune_cli.required_memory

    def remembered(language, **sizes):
        key = (language.identity(), repr(sorted(sizes.items(), key=lambda item: item[0])))
        if key not in _counted:
            _counted[key] = real(language, **sizes)
        return _counted[key]

    monkeypatch.setattr(finetune_cli, "required_memory", remembered)
