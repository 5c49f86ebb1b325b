# The compiled extension (bindings/build_core.py): cffi's objects, whose names come from csrc/star_edge.h
from typing import Any

ffi: Any
lib: Any
