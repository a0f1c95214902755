"""The C++ backend, compiled here, against the formulas in fp64; without a compiler its refusals alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_attn.cli import main
from dit_attn.errors import DitAttnError
from dit_attn.kernels import (
    BlockLayout,
    Choice,
    block_stats,
    build_cpp,
    choose_backend,
    inward_window,
    pooled_compensation,
    reference_attention,
    sparse_attention,
)
from dit_attn.kernels.backends.cpp import forward, library
from dit_attn.kernels.block_stats import attention_with_block_stats
from dit_attn.kernels.cost import Cost, CostTable, lookup
from dit_attn.kernels.cost.store import VARIABLE, save_table
from dit_attn.kernels.functional import contending_backends
from tests._support.kernel_cases import TERMS, assert_formulas, assert_gradients_of_gather, call

needs_cpp = pytest.mark.skipif(
    library.unsupported_reason_machine() is not None or library._compiler() is None, reason="no C++ kernel can be built"
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CACHES = (library.built, library.library, library._unsupported_reason_type)
MEASURED = (lookup._comparison, lookup._table_of_process)


def forget(*caches: Any) -> None:
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for what is compiled, shared by the processes that run the tests."""
    path = tmp_path_factory.getbasetemp().parent / "dit_attn_cpp"
    monkeypatch.setenv(library.VARIABLE, str(path))
    forget(*CACHES)
    yield path
    forget(*CACHES)


@pytest.fixture
def cpp(folder: Path) -> None:
    build_cpp()


@needs_cpp
@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("altered", (False, True))
@pytest.mark.parametrize("dim", (16, 18, 72))
def test_it_agrees_with_the_formulas(dtype: torch.dtype, altered: bool, dim: int) -> None:
    assert_formulas("cpp", dtype, dim, altered, TOLERANCE[dtype], 1e-5)


@needs_cpp
@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("term", [name for name in TERMS if TERMS[name](call()).bias is None])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("columns", (512, 2))
def test_optional_terms_are_those_of_gather(
    term: str, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pooled keys are in the same pass, in one block or in several, with more than one group of heads."""
    for name, value in (("COLUMNS", columns), ("GROUP", 1 if columns == 2 else 8 << 20)):
        monkeypatch.setattr(forward, name, value)
    p = call(dtype, key_mask=True, key_bias=True)
    terms = TERMS[term](p)
    given = {name: getattr(terms, name) for name in ("key_lengths", "compensation", "epilogue")}
    given |= {"key_mask": p.key_mask, "key_bias": p.key_bias, "scale": p.scale, "return_lse": True}
    found, expected = (sparse_attention(p.q, p.k, p.v, p.layout, backend=name, **given) for name in ("cpp", "gather"))
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)


@needs_cpp
@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunks_groups_threads_and_strides_do_not_change_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits far apart from chunk to chunk, blocks of 36 tokens, heads that lie apart, threads, one head a group."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 600, 64, generator=rng).to(dtype).transpose(2, 3).unbind()
    k = k * torch.linspace(0.1, 12, 600).to(dtype)[:, None, None]
    layout = BlockLayout.from_mask(torch.rand(1, 4, 17, 17, generator=rng) < 0.6, 600, 600, 36, 36)
    expected = reference_attention(q.double(), k.double(), v.double(), layout)
    results = []
    for columns, group, large in ((512, 8 << 20, 1 << 17), (36, 1, 0)):
        for name, value in (("COLUMNS", columns), ("GROUP", group), ("LARGE", large)):
            monkeypatch.setattr(forward, name, value)
        results.append(sparse_attention(q, k, v, layout, return_lse=True, backend="cpp"))
    for out, lse in results:
        torch.testing.assert_close(out.double(), expected[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
    again = sparse_attention(q, k, v, layout, return_lse=True, backend="cpp")
    assert torch.equal(again[0], results[1][0]) and torch.equal(again[1], results[1][1])  # whoever takes which tile


@needs_cpp
@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("statistic, pooled", [("mass", None), ("error", None), ("error", 4), ("error", 8)])
@pytest.mark.parametrize("biased", (False, True))
def test_statistics_of_blocks_are_those_of_plain_torch(
    dtype: torch.dtype, statistic: str, pooled: int | None, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged, masked, grouped heads; a sample without any key, several blocks of pooled keys, groups of one head."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(3, 37, 4, 24, generator=rng).to(dtype)
    k, v = (torch.randn(3, 45, 2, 24, generator=rng).to(dtype) for _ in range(2))
    mask = torch.rand(3, 45, generator=rng) < 0.8
    mask[1, 8:16], mask[2] = False, False
    bias = torch.randn(1, 4, 45, generator=rng).masked_fill(~mask[:, None], -torch.inf) if biased else None
    given: dict[str, Any] = {"q_block": 8, "kv_block": 8, "statistic": statistic, "pooled": pooled}
    given |= {"key_mask": mask, "key_bias": bias}
    expected = attention_with_block_stats(q.double(), k.double(), v.double(), **given)
    for name, value in (("COLUMNS", 4), ("GROUP", 1)):
        monkeypatch.setattr(forward, name, value)
    monkeypatch.setattr(block_stats, "choose_backend", lambda *args, **kwargs: Choice("cpp", {}))
    found = attention_with_block_stats(q, k, v, **given)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found.out.double(), expected.out, **tolerance)
    torch.testing.assert_close(found.lse.double(), expected.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.blocks.double(), expected.blocks, **tolerance)


@needs_cpp
@pytest.mark.usefixtures("cpp")
def test_gradients_are_those_of_gather_and_compiled_calls_are_one_graph() -> None:
    assert_gradients_of_gather("cpp")
    q, k, v = torch.randn(3, 1, 40, 2, 8).unbind()
    layout = BlockLayout.from_mask(torch.rand(1, 2, 3, 3) < 0.7, 40, 40, 16, 16)

    def attend(q: torch.Tensor) -> Any:
        comp = pooled_compensation(k, v, 16)
        return sparse_attention(q, k, v, layout, compensation=comp, return_lse=True, backend="cpp")

    compiled = torch.compile(attend, backend="eager", fullgraph=True)(q)
    assert all(torch.equal(a, b) for a, b in zip(compiled, attend(q)))


@needs_cpp
@pytest.mark.usefixtures("cpp")
def test_nan_and_infinity_come_out_as_from_gather() -> None:
    q, k, v = torch.randn(3, 1, 64, 1, 16).unbind()
    q[0, 3], k[0, 40], q[0, 20, 0, 0] = torch.nan, torch.nan, torch.inf
    layout = BlockLayout.from_mask(torch.tensor([[True, False], [True, True]])[None, None], 64, 64, 32, 32)
    found, expected = (sparse_attention(q, k, v, layout, backend=name) for name in ("cpp", "gather"))
    assert isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor)
    assert torch.equal(found.isnan(), expected.isnan()) and 0 < int(found.isnan().sum()) < found.numel()
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@needs_cpp
@pytest.mark.usefixtures("cpp")
def test_what_it_cannot_run_is_refused_with_the_reason() -> None:
    x = torch.randn(1, 64, 2, 8)
    odd = BlockLayout.dense(64, 64, 16, 13)
    for given, message in (
        ((x, x, x, inward_window((8, 8), (3, 3), q_block=16, kv_block=16)), "element masks"),
        ((x, x, x[..., :4], BlockLayout.dense(64, 64, 16, 16)), "head size"),
        ((x.double(), x.double(), x.double(), odd), "fp32 and bf16"),
        ((x.bfloat16(), x.bfloat16(), x.bfloat16(), odd), "kv_block are even, these are 8 and 13"),
    ):
        with pytest.raises(DitAttnError, match=message):
            sparse_attention(*given, backend="cpp")
    p = call()
    with pytest.raises(DitAttnError, match="low-rank bias"):
        sparse_attention(p.q, p.k, p.v, p.layout, bias=TERMS["bias"](p).bias, backend="cpp")


# -- when it is chosen, and when it is there ---------------------------------------------------------------------------


@needs_cpp
@pytest.mark.usefixtures("cpp")
def test_only_a_measurement_makes_it_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 512, 2, 64)
    layout = BlockLayout.from_topk(torch.randn(1, 2, 16, 16), 4, q_len=512, kv_len=512, q_block=32, kv_block=32)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "costs.json"))
    assert choose_backend(x, layout).reasons["cpp"] == "not measured on this machine for such a call; only on request"
    assert contending_backends(x, layout) == ("gather", "cpp")
    costs = (
        Cost(64, "float32", 512, 0.25, 0.5, "cpp", ("gather",)),
        Cost(64, "float32", 4096, 0.25, 0.5, "gather", ("cpp",)),
    )
    save_table(CostTable(lookup.this_machine("cpu"), costs))
    forget(*MEASURED)
    try:
        choice = choose_backend(x, layout)
        at = "on this machine, measured at 512 tokens, heads of 64, density 0.25"
        assert choice.backend == "cpp" and choice.why == f"about as fast as gather or faster {at}"
        assert contending_backends(x, layout) == ("cpp", "gather")
        assert choose_backend(x.requires_grad_(), layout).backend == "gather"  # nobody measures gradients
        large = torch.randn(1, 4096, 1, 64)
        dense = BlockLayout.from_topk(torch.randn(1, 1, 32, 32), 8, q_len=4096, kv_len=4096, q_block=128, kv_block=128)
        assert choose_backend(large, dense).reasons["cpp"].startswith("not clearly faster than gather on this machine")
    finally:
        forget(*MEASURED)


def test_nothing_is_compiled_unless_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(library.VARIABLE, str(tmp_path))
    x = torch.randn(1, 64, 2, 8)
    layout = BlockLayout.dense(64, 64, 16, 16)
    if library.unsupported_reason_machine() is None:
        with pytest.raises(DitAttnError, match="it is not compiled; dit-attn bench kernels --save does"):
            sparse_attention(x, x, x, layout, backend="cpp")
    assert "cpp" not in contending_backends(x, layout) and not any(tmp_path.iterdir())
    monkeypatch.setattr(library, "unsupported_reason_machine", lambda: "it is for Linux")
    with pytest.raises(DitAttnError, match=r"cannot compile the C\+\+ kernel: it is for Linux"):
        build_cpp()
    assert choose_backend(x, layout).reasons["cpp"] == "it is for Linux"


@pytest.mark.skipif(library.unsupported_reason_machine() is not None, reason="not a machine for it")
def test_what_a_compiler_says_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "built"))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    said = "cannot compile the C++ kernel (x.cpp:1: error: no such thing)"
    for command in (["--backend", "cpp"], ["--against", "cpp"]):
        assert main(["bench", "kernels", "--seq", "64", "--block", "32", *command]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DitAttnError, match=r"no C\+\+ compiler; install g\+\+ or clang\+\+, or set CXX to one"):
        build_cpp()
    assert not list((tmp_path / "built").glob("*.so")) and not library.built()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(library, "_compiler", lambda: "g++")
    with pytest.raises(DitAttnError, match=f"set {library.VARIABLE} to a folder to write to"):
        build_cpp()


@needs_cpp
def test_what_another_process_compiled_is_found(cpp: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Although this process had looked before it was there."""
    with monkeypatch.context() as patch:
        patch.setenv(library.VARIABLE, str(tmp_path))
        forget(*CACHES)
        assert not library.built()
    assert library.unsupported_reason_here(torch.float32) is not None
    build_cpp()
    assert library.unsupported_reason_here(torch.float32) is None


@needs_cpp
def test_a_file_that_cannot_be_loaded_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(library.VARIABLE, str(tmp_path))
    library._path().write_bytes(b"no library")
    x = torch.randn(1, 64, 2, 8)
    assert choose_backend(x, BlockLayout.dense(64, 64, 16, 16)).reasons["cpp"] == "its compiled file cannot be loaded"
