"""Names of the exported files."""

NAME = "pagevlm"
KINDS = ("f16", "q8_0")


def text_file(kind: str) -> str:
    return f"{NAME}-text-{kind}.gguf"


def mmproj_file(kind: str) -> str:
    return f"{NAME}-mmproj-{kind}.gguf"
