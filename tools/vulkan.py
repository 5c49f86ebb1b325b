"""Runs tests with the models on a Vulkan device (`make test-vulkan`).

    python tools/vulkan.py [--placement all] [--all] [--jobs 2] [--build-only] [files, ids or -k of pytest]

ggml's Vulkan backend is built from the source of the installed llama-cpp-python, once, and put beside copies of the
other libraries in .processors/vulkan (tools/processors.py). The Python packages stay as they are. The device is Mesa's
software device, unless VK_DRIVER_FILES names another driver. What is needed of the system is installed where apt-get
is and may be used; elsewhere the error names it.

The software device takes seconds for what a processor does in milliseconds. So the default is a selection (SELECTED):
each family of models with everything kept and pruned, in each placement, and some of what else can differ on a device.
What must be equal bit for bit runs with the device's arithmetic of 16 bits, what has a bound with 32 (BIT_FOR_BIT).
--all runs whole files.

That device follows descriptors of buffers that are gone, which Vulkan allows to be there; stock llama.cpp crashes on it
too. In this build the buffers stay (tools/vulkan_headers.hpp). What may still crash is told apart by asking stock
(tools/vulkan_runs.py).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import vulkan_runs
from processors import FOLDER, ROOT, build, environment_of, source

HEADERS = Path(__file__).with_name("vulkan_headers.hpp")
LIBRARIES = ("libggml.so", "libggml-vulkan.so")
ICD_FOLDERS = ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d")
LOGS = ROOT / "build" / "vulkan"
FAMILIES = ROOT / "tests" / "fixtures"
SHADERS = "vendor/llama.cpp/ggml/src/ggml-vulkan/vulkan-shaders"  # in the source of llama-cpp-python
PER_PROCESS = 6  # families: a process takes seconds to begin

# placement (tests/helpers/gpu.py) -> files of the suite
SUITES = {
    "all": "families exact faithful windows reuse encoder_units vision repair tap_inputs",
    "half": "families exact",
    "encoder": "families exact",
}
# Patterns are ids without tests/test_, in which * is any text.
# What must be equal bit for bit, whatever the device rounds: with the arithmetic that it has. All else has a bound that
# comes from its rounding. In 16 bits llama.cpp itself rounds so much on some fixtures (5% of a deviation, 1% on
# processors) that a wrong result would lie within: these tests run with 32 bits, as on a device that has no other.
BIT_FOR_BIT = (
    "families.py::test_whole_pipeline_equals_stock[*]",
    "families.py::test_keep_all_equals_stock[*]",
    "families.py::test_frames[*]",
    "families.py::test_features[*]",  # their bound is cosines of 0.999, on any backend
    "families.py::test_what_is_repaired[*]",
    "families.py::test_encoder_stage[*]",
    "families.py::test_redundant_tokens[*]",
    "exact.py::*",
    "windows.py::test_keep_all_is_exact[*]",
    "reuse.py::*",
    "encoder_units.py::test_everything_kept_is_the_picture_for_every_layer[*]",
    "encoder_units.py::test_all_units_composed_are_the_picture[*]",
)
# placement -> what runs without --all
IN_EACH = (
    "families.py::test_whole_pipeline_equals_stock[*-fa]",  # everything kept, from pixels to the answer
    "families.py::test_both_stages[*-fa]",  # pruned, from pixels to logits
)
SELECTED = {
    "all": (
        *IN_EACH,
        "families.py::test_features[*]",
        "families.py::test_what_is_repaired[*]",
        "families.py::test_encoder_stage[*]",
        "exact.py::test_keep_all_equals_stock[*-no-fa-one-image]",
        "exact.py::test_keep_all_equals_stock[*-fa-q8_0-three-images]",
        "exact.py::test_ordinary_decode_after_a_pruned_one",
        "faithful.py::test_pruned_logits_and_continuation[*-fa]",
        "faithful.py::test_positions_are_kept[*]",
        "faithful.py::test_both_stages_end_to_end[*]",
        "faithful.py::test_attention_mass[*-fa]",
        "windows.py::test_keep_all_is_exact[*]",
        "windows.py::test_pruned_logits_scores_and_continuation[*]",
        "reuse.py::test_answers_to_a_further_question_equal_a_fresh_engines[*]",
        "encoder_units.py::test_some_units_are_the_encoder_of_those_units[*-fa]",
        "encoder_units.py::test_units_that_leave_at_a_layer[*-fa]",
        "vision.py::test_qwen2vl_scores[*]",
        "repair.py::test_repaired_features_are_clips_own[*]",
        "tap_inputs.py::*",
    ),
    "half": (*IN_EACH, "exact.py::test_keep_all_equals_stock[*-fa-q8_0-one-image]"),
    "encoder": (*IN_EACH, "exact.py::test_keep_all_equals_stock[*-fa-q8_0-one-image]"),
}
NOT_HERE = "tests/test_families.py::test_support_table"  # docs/models.md speaks of processors


def shorten(shader: Path) -> None:
    """Leaves one of the ten copies of the function in rms_norm.comp, which differ in how far a loop is unrolled.

    Mesa's software device takes both ways at each `if`, so it would run all ten for each row: nine tenths of the time
    of a test. The copy that stays is the shader's own for the longest rows. It adds up the same numbers in the same
    order. Raises SystemExit where the shader is another than the one that this was written for.
    """
    text = shader.read_text()
    start, chain = text.partition("void main() {")[::2]
    calls = re.findall(r"\brms_norm\((\w+)\);", chain)
    if calls == ["num_blocks"]:
        return  # of an earlier run
    if len(calls) != 10 or calls[0] != "num_blocks":
        sys.exit(f"{shader} has changed: read tools/vulkan.py, shorten")
    count = re.search(r"^.*\bnum_blocks = .*;$", chain, re.MULTILINE)
    assert count
    shader.write_text(f"{start}void main() {{\n{count[0]}\n    rms_norm(num_blocks);\n}}\n")


def software_device() -> str:
    """Mesa's driver of its software device, "" where it is not installed."""
    return next((str(f) for folder in ICD_FOLDERS for f in sorted(Path(folder).glob("lvp_icd*.json"))), "")


def missing() -> list[str]:
    """Debian's packages of what is not there."""
    there = {
        "glslc": shutil.which("glslc"),
        "libvulkan-dev": any(Path(p, "vulkan/vulkan.hpp").exists() for p in ("/usr/include", "/usr/local/include")),
        "spirv-headers": any(Path(p, "spirv/unified1").exists() for p in ("/usr/include", "/usr/local/include")),
        "mesa-vulkan-drivers": os.environ.get("VK_DRIVER_FILES") or software_device(),
    }
    return [package for package, found in there.items() if not found]


def prepare() -> None:
    """Installs what is missing. Raises SystemExit where it cannot."""
    packages = missing()
    if packages and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], check=True)
        packages = missing()
    if packages:
        sys.exit(f"install {' '.join(packages)} (so Debian calls them), then run this again")


def environment(libraries: Path, placement: str, bits: int) -> dict[str, str]:
    """That of the tests, with arithmetic of 16 bits or of 32.

    ggml leaves out processors among the devices unless they are asked for by number. Mesa's own threads are off: every
    core has a test already. What Mesa compiles of the shaders it keeps beside the libraries.
    """
    driver = os.environ.get("VK_DRIVER_FILES") or software_device()
    return {
        "GGML_VK_VISIBLE_DEVICES": "0",
        "LP_NUM_THREADS": "0",
        "OMP_THREAD_LIMIT": "1",
        "MESA_SHADER_CACHE_DIR": str(FOLDER / "mesa"),
        **environment_of(libraries),
        **({"GGML_VK_DISABLE_F16": "1"} if bits == 32 else {}),
        "VK_DRIVER_FILES": driver,
        "VK_ICD_FILENAMES": driver,  # the name before Vulkan 1.3.207
        "STAR_EDGE_TEST_GPU": placement,
    }


def device(variables: dict[str, str]) -> str:
    """What the models run on. Raises SystemExit if ggml sees no Vulkan device."""
    code = (
        "from star_edge.llamacpp.devices import list_devices as ds\nfor d in ds(): print(d['name'], d['description'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("Vulkan")]
    if not found:
        sys.exit(f"ggml sees no Vulkan device:\n{done.stdout}{done.stderr}")
    return found[0]


def is_selected(test: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns, in which * is any text, is the whole id without its folder."""
    name = test.removeprefix("tests/test_")
    return any(re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) for pattern in patterns)


def family(test: str) -> str:
    """The folder of tests/fixtures that an id's first parameter names, "" if there is none."""
    parameters = test.partition("[")[2].rstrip("]")
    names = (folder.name for folder in FAMILIES.iterdir() if folder.is_dir())
    fitting = [name for name in names if parameters == name or parameters.startswith(f"{name}-")]
    return max(fitting, key=len, default="")


def batches(placement: str, tests: Iterable[str], seconds: float) -> dict[int, list[vulkan_runs.Batch]]:
    """Bits of arithmetic -> a process for each file, or for some families of a file that has all."""
    groups: dict[tuple[int, str], dict[str, list[str]]] = {}
    for test in tests:
        bits = 16 if is_selected(test, BIT_FOR_BIT) else 32
        file = Path(test.partition("::")[0]).stem.removeprefix("test_")
        groups.setdefault((bits, file), {}).setdefault(family(test), []).append(test)
    made: dict[int, list[vulkan_runs.Batch]] = {}
    for (bits, file), by_family in groups.items():
        names = sorted(by_family)
        for number, i in enumerate(range(0, len(names), PER_PROCESS), 1):
            some = [test for name in names[i : i + PER_PROCESS] for test in by_family[name]]
            title = f"{placement}-{file}-{bits}" + (f"-{number}" if len(names) > PER_PROCESS else "")
            made.setdefault(bits, []).append(vulkan_runs.Batch(title, some, seconds))
    return made


def run(libraries: Path, placement: str, options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """The tests of one placement. Whether all is well."""
    start, variables = time.monotonic(), {bits: environment(libraries, placement, bits) for bits in (16, 32)}
    files = [f"tests/test_{name}.py" for name in SUITES[placement].split()]
    named = any(Path(ROOT, argument.partition("::")[0]).exists() for argument in arguments)
    tests = vulkan_runs.collect(
        ROOT, variables[16], [*(() if named else files), *arguments], LOGS / f"{placement}-collect.log"
    )
    if not (named or options.all):
        tests = [test for test in tests if is_selected(test, SELECTED[placement])]
    tests = [test for test in tests if not test.startswith(NOT_HERE)]
    made = batches(placement, tests, options.seconds)
    print(f"== {placement}: {len(tests)} tests on {device(variables[16])}", flush=True)

    def one(bits: int, batch: vulkan_runs.Batch) -> None:
        vulkan_runs.run(ROOT, variables[bits], batch, LOGS)
        print(f"{batch.title}: {vulkan_runs.counts([batch])}; {batch.wall:.0f} s", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for job in [pool.submit(one, bits, batch) for bits, some in made.items() for batch in some]:
            job.result()
    every = [batch for some in made.values() for batch in some]
    if said := vulkan_runs.summary(every):
        print(said)
    minutes = (time.monotonic() - start) / 60
    print(f"== {placement}: {vulkan_runs.counts(every)}; {minutes:.1f} minutes; output in {LOGS}", flush=True)
    return bool(every) and all(batch.is_well for batch in every)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Runs tests with the models on a Vulkan device.",
        epilog="Everything else goes to pytest: files or ids in place of the suites, -k, -m.",
    )
    parser.add_argument("--placement", choices=SUITES, help="default: all three, one after the other")
    parser.add_argument("--all", action="store_true", help="whole files, not the selection: hours")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="for a process; what is left then has not run (default: 600)"
    )
    parser.add_argument("--build-only", action="store_true", help="stop when the libraries are there")
    options, arguments = parser.parse_known_args()
    prepare()
    shorten(source() / SHADERS / "rms_norm.comp")
    libraries = build("vulkan", "ggml", LIBRARIES, ["-DGGML_VULKAN=ON"], f"-include {HEADERS}")
    if options.build_only:
        return
    placements = [options.placement] if options.placement else list(SUITES)
    bad = [placement for placement in placements if not run(libraries, placement, options, arguments)]
    if bad:
        sys.exit(f"not all is well: {', '.join(bad)}")


if __name__ == "__main__":
    main()
