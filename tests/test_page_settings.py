"""What the server's page makes of its settings: `prune` of a request. The scripts themselves, in Node."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import star_edge.server
from star_edge import PRESETS, PruneConfig
from star_edge.pruning.presets import override
from star_edge.server.routes import _changes
from star_edge.server.schema import parse_prune

PAGE = Path(star_edge.server.__file__).parent / "page"
PLAIN = {"preset": "balanced", "share": 25, "size": 1, "repeats": False, "budget": ""}
ADAPTS = PruneConfig(0.3, 0.15, encoder_keep=0.1, encoder_layer=2, encoder_tolerance=0.1, vision_tolerance=0.2)
CONFIGS = {**{name: config for name, config in PRESETS.items() if config is not None}, "server": ADAPTS}

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node")


def prunes(cases):
    """`prune` for each of the settings, with the configs by name; "nothing" for none."""
    script = f"""
        import {{ pruneOf }} from {json.dumps((PAGE / "api.js").as_uri())};
        const of = ([settings, presets]) => pruneOf(settings, presets) ?? "nothing";
        console.log(JSON.stringify({json.dumps(cases)}.map(of)));
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(done.stdout)


@needs_node
def test_a_shared_budget_is_that_of_the_command_line():
    presets = {name: _changes(config) for name, config in CONFIGS.items()}
    found = prunes([({**PLAIN, "preset": name, "budget": "prompt"}, presets) for name in CONFIGS])
    for config, prune in zip(CONFIGS.values(), found):
        assert parse_prune(prune) == override(config, budget="prompt")


@needs_node
def test_what_is_changed_of_the_servers_own():
    server = {**PLAIN, "preset": "server"}
    smaller = {**server, "size": 0.5}
    plain, changed, unpruned = prunes(
        [(server, {}), (smaller, {"server": _changes(ADAPTS)}), (smaller, {"server": None})]
    )
    assert plain == "nothing"  # as the server was started
    assert parse_prune(changed) == override(ADAPTS, image_max_tokens=0.5)
    assert parse_prune(unpruned) == PruneConfig(image_max_tokens=0.5)


@needs_node
def test_areas_that_repeat():
    presets = {name: _changes(config) for name, config in CONFIGS.items()}
    repeats = {**PLAIN, "repeats": True}
    exact, document = prunes([(repeats, presets), ({**repeats, "preset": "document"}, presets)])
    assert parse_prune(exact).redundancy == "exact"
    assert document == "document"  # which leaves out more


def test_every_preset_is_described():
    words = (PAGE / "words.js").read_text()
    described = re.search(r"export const PRESETS = \{(.*?)\n\};", words, re.DOTALL)[1]
    assert set(PRESETS) - {"off"} <= set(re.findall(r"^  (\w+):", described, re.MULTILINE))
