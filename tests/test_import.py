"""`import gradlr` is what every training run waits for: it adds little to `import torch`."""

import subprocess
import sys

# Each of them costs more than all of gradlr; a compiler's front end alone takes seconds.
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "matplotlib",
    "rich",
    "transformers",
)
ON_FIRST_USE = ("gradlr.apps", "gradlr.integrations", "gradlr.checkpoint")


def test_importing_gradlr_imports_neither_a_compiler_nor_an_application():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import gradlr\n"
        f"heavy = {(*HEAVY, *ON_FIRST_USE)!r}\n"
        "added = sorted(name for name in set(sys.modules) - before if name.startswith(heavy))\n"
        "assert not added, added"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_what_is_loaded_on_first_use_is_there_and_is_listed():
    code = (
        "import gradlr\n"
        "assert set(gradlr.__all__) <= set(dir(gradlr))\n"
        "assert all(getattr(gradlr, name) is not None for name in gradlr.__all__)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
