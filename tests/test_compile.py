"""Compiled models."""

import shutil

import pytest
import torch
from tiny import last_weights
from torch import nn

from tvit_cli.engine.train.build import compile_model
from tvit_cli.errors import RunError, SettingsError

CPU = torch.device("cpu")


def counting(monkeypatch):
    """torch.compile with a back end that notes down the shapes of the graphs that it runs as they are."""
    shapes = []
    real = torch.compile

    def backend(graph, inputs):
        shapes.append(next(tuple(i.shape) for i in inputs if i.dim() == 5))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **how: real(model, backend=backend, **how))
    return shapes


def test_compiled_run_compiles_each_size_once_and_keeps_names(trained, monkeypatch):
    what = {"per_gpu_batch_size": 5, "lora_dropout": 0.0, "gradient_checkpointing": True}
    plain = trained(**what)
    torch.compiler.reset()
    shapes = counting(monkeypatch)
    compiled = trained(**what, compile=True)
    assert [shape[0] for shape in shapes] == [5, 2]  # 12 clips: 5, 5, 2, in each of two epochs
    a, b = last_weights(plain), last_weights(compiled)
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, while it loads
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiler_gives_the_numbers_of_the_plain_module():
    torch.compiler.reset()
    plain = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    fast = compile_model(plain, CPU)
    clips = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(clips), plain(clips))
    assert type(fast) is not nn.Sequential


def test_without_a_compiler_compilation_is_refused_in_a_sentence(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        SettingsError, match=r"--compile: PyTorch needs a C\+\+ compiler; no-such-compiler is missing"
    ):
        trained(compile=True)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_compiled_ends_with_a_sentence(trained, monkeypatch):
    torch.compiler.reset()
    real = torch.compile

    def backend(graph, inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch, "compile", lambda model, **how: real(model, backend=backend, **how))
    with pytest.raises(
        RunError, match=r"--compile: PyTorch could not compile the model: .*no such instruction"
    ):
        trained(compile=True)
