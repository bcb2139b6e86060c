"""stiefelopt inside other libraries. Each module needs its extra; nothing else in the package imports them."""
