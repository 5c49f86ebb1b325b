"""Times and memory of stock llama.cpp and of pruned configs, side by side."""
