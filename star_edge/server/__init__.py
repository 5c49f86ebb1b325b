"""`star-edge serve`: llama-cpp-python's own OpenAI-compatible server with image-token pruning, safe limits, metrics and a page."""
