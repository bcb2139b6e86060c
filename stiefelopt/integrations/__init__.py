"""stiefelopt inside other libraries. Each module needs its extra: pip install stiefelopt[peft], [transformers], ..."""
