"""Train all weights, ship megabytes: the difference between fine-tuned and base weights as a peft LoRA adapter."""

from .export import export_lora
from .report import LoraLayer, LoraReport

__all__ = ["LoraLayer", "LoraReport", "export_lora"]
