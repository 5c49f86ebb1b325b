"""A pytest plugin: the core of STAR_EDGE_SANITIZED_CORE is star_edge._core, whatever is installed."""

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location("star_edge._core", os.environ["STAR_EDGE_SANITIZED_CORE"])
_core = importlib.util.module_from_spec(_spec)
sys.modules["star_edge._core"] = _core
_spec.loader.exec_module(_core)


def pytest_report_header():
    return f"core: {_core.__file__}"
