"""What star_edge takes for granted of llama.cpp and llama-cpp-python: one test for each assumption.

The names of the tests are the assumptions, in words: `make check-llama VERSION=x` prints which of them hold in another
version. Models are tiny and random; nothing of star_edge's engine is used where the library itself can be asked.
"""

import numpy as np
import pytest
from helpers import stock
from helpers.families import FOLDER
from helpers.graphs import N, RecordedEncoder, Recorder, recorded


@pytest.fixture(scope="session")
def plain(families):
    """(family, flash) -> a stock Llama."""
    made = {}

    def get(family="llama", flash=True):
        if (family, flash) not in made:
            made[family, flash] = stock.load(families[family].text, flash, n_threads=1)
        return made[family, flash]

    yield get
    for llama in made.values():
        llama.close()


@pytest.fixture(scope="session")
def decoder_graph(plain, families):
    """(family, flash, tokens=True) -> the nodes of one decode of N rows."""
    made = {}

    def get(family="llama", flash=True, tokens=True):
        key = family, flash, tokens
        if key not in made:
            recorder = Recorder()
            context = recorded(plain(family, flash), recorder)
            if tokens:
                stock.decode(context, tokens=np.arange(N) + 260, positions=np.arange(N))
            else:
                positions = np.arange(N)
                if families[family].mrope:
                    positions = np.stack([positions] * 3 + [0 * positions])
                width = families[family].shape.n_embd
                stock.decode(context, embeddings=np.zeros((N, width), np.float32), positions=positions)
            context.close()
            made[key] = recorder.nodes
        return made[key]

    return get


@pytest.fixture(scope="session")
def fixture_path():
    """(family, file) -> the file of a fixture."""
    return lambda family, name: FOLDER / family / name


@pytest.fixture(scope="session")
def encoders(families):
    """(name of a fixture, or of `families`) -> a RecordedEncoder."""
    made = {}

    def get(name):
        if name not in made:
            text, mmproj = (families[name].text, families[name].mmproj) if name in families else (None, None)
            folder = FOLDER / name
            llama = stock.load(text or folder / "text.gguf", False, n_ctx=512, n_threads=1)
            made[name] = RecordedEncoder(llama, mmproj or folder / "mmproj.gguf"), llama
        return made[name][0]

    yield get
    for encoder, llama in made.values():
        encoder.close()
        llama.close()
