"""`python as_on_gpus.py finetune ...` under torchrun: with FSDP2 as `accelerate launch` asks for it, which CPUs do not get."""

import os
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "integrations")]

from process_checks import LAUNCHED, as_on_gpus  # noqa: E402

from gradlr.apps.cli import main  # noqa: E402
from gradlr.apps.finetune import finetune_cli  # noqa: E402


class _AsOnGPUs(finetune_cli.Finetuner):
    def create_accelerator_and_postprocess(self):
        as_on_gpus()
        super().create_accelerator_and_postprocess()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    finetune_cli.Finetuner = _AsOnGPUs
    os.environ |= LAUNCHED
    sys.exit(main(sys.argv[1:]))
