"""`python -m star_edge`: the command `star-edge`."""

from .cli import main

main("python -m star_edge")
