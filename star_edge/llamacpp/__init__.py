"""All that star_edge knows of the inside of llama.cpp and llama-cpp-python."""
