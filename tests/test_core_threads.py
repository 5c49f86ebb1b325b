"""The C core from several threads. Under `make sanitize` the same is checked for races (tools/sanitize/threads.c)."""

import ctypes
import threading

import numpy as np

from star_edge.llamacpp.native import ffi, lib

WARN, ERROR, INFO = 3, 4, 2  # enum ggml_log_level


def in_threads(n, function):
    barrier, failures = threading.Barrier(n), []

    def call(i):
        try:
            barrier.wait()
            function(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def log(level, text):
    lib.se_log_callback(level, text.encode(), ffi.NULL)


def kept():
    return ffi.string(lib.se_log_text()).decode()


def test_each_thread_has_its_own_log():
    """Two files that are loaded at once: the reason of the one must not be given for the other, nor cut short."""

    def load(i):
        for round in range(100):
            lib.se_log_clear()
            log(INFO, "a listing")
            log(ERROR, f"thread {i}, ")
            log(WARN, f"round {round}")
            assert kept() == f"thread {i}, round {round}"

    in_threads(8, load)


def test_a_log_that_is_full_keeps_its_beginning():
    lib.se_log_clear()
    for i in range(1000):
        log(ERROR, f"line {i:04d}\n")
    text = kept()
    assert text.startswith("line 0000\nline 0001\n") and len(text) < 4096
    lib.se_log_clear()
    assert kept() == ""


def test_scores_from_threads():
    """The kernel starts threads of its own in each."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((5, 3, 8)).astype(np.float32), rng.standard_normal((9, 3, 8)).astype(np.float32)
    products = np.einsum("rhd,jhd->hrj", q.astype(np.float64), k.astype(np.float64)) / 8
    expected = np.exp(products) / np.exp(products).sum(-1, keepdims=True)

    def score(_):
        a = ffi.new("se_attention *")
        a.q, a.q_row_stride, a.q_head_stride = ffi.cast("void *", q.ctypes.data), q.strides[0], q.strides[1]
        a.n_rows, a.n_head, a.head_dim = q.shape
        a.k, a.k_row_stride, a.k_head_stride = ffi.cast("void *", k.ctypes.data), k.strides[0], k.strides[1]
        a.n_kv, a.n_head_kv, a.scale = k.shape[0], k.shape[1], 1 / 8
        out = np.empty(expected.shape, np.float32)
        for n_threads in (1, 2, 3):
            assert (
                lib.se_attention_scores(a, lib.SE_KEEP, n_threads, ffi.cast("float *", out.ctypes.data), out.size)
                == lib.SE_OK
            )
            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)

    in_threads(6, score)


def test_the_callback_is_what_ctypes_calls():
    lib.se_log_clear()
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lib.se_log_callback_address())
    callback(ERROR, b"through ctypes", None)
    callback(ERROR, None, None)
    assert kept() == "through ctypes"
