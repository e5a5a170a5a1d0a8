"""packed.py and quantize.py: rounding by hand, both paths of a layer, small files, users' mistakes."""

import copy
import dataclasses
import re

import pytest
import torch

import bench
import chain
import packed
import quantize
import sample
from bpe import SPECIAL_TOKENS, Tokenizer
from checkpoint import load_model, random_model
from model import GPT, GPTConfig, count_parameters
from packed import (GROUP, Int4Linear, Int8Linear, has_kernel, pack_int4, quantize_int4, quantize_int8,
                    quantize_model, unpack_int4, weight_bytes)

SHAPE = GPTConfig(vocab_size=262, context=32, depth=2, width=64, heads=2, kv_heads=1, hidden=96)


def make() -> GPT:
    torch.manual_seed(0)
    model = GPT(SHAPE).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def float_weights(q, scale, zero) -> torch.Tensor:
    groups = q.unflatten(-1, (-1, GROUP)).float()
    return ((groups - zero[..., None].float()) * scale[..., None].float()).flatten(-2)


def test_int8_by_hand():
    q, scale = quantize_int8(torch.tensor([[2.54, -1.27, 0.013], [0.0, 0.0, 0.0], [-5.0, 1.0, 4.99]]))
    assert q.dtype == torch.int8 and q.tolist() == [[127, -64, 1], [0, 0, 0], [-127, 25, 127]]
    assert scale[:, 0].tolist() == pytest.approx([0.02, 1, 5 / 127]), "a row of zeros has one too"
    assert q.min() == -127, "-128 has no opposite"


def test_int8_scales_stand_on_the_output_side():
    """The trap: scales along the wrong axis. One large row must not coarsen the others."""
    w = torch.randn(8, 64)
    w[3] *= 1000
    q, scale = quantize_int8(w)
    error = ((q * scale - w).norm(dim=1) / w.norm(dim=1)).max()
    assert error < 0.01, f"a large row coarsens another: relative error {error:.2f}"
    assert ((q * scale - w).abs() <= scale / 2 + 1e-6).all(), "no weight is off by more than half a step"


def test_int4_uses_all_levels_and_keeps_zero():
    w = torch.linspace(-1, 2, GROUP)[None]
    q, scale, zero = quantize_int4(w)
    assert (q.min(), q.max()) == (0, 15) and float(scale) == pytest.approx(0.2, rel=1e-3) and int(zero) == 5
    back = float_weights(q, scale, zero)
    assert (back - w).abs().max() <= 0.1 + 1e-3, "no weight is off by more than half a step"
    assert (float_weights(*quantize_int4(torch.zeros(1, GROUP))) == 0).all(), "zeros stay zeros"


@pytest.mark.parametrize("shift", [5.0, -5.0, 0.0])
def test_int4_zero_point_stays_in_range(shift):
    """The trap: a group on one side of 0 has its zero point outside of 0 … 15, and a byte wraps it around."""
    w = torch.rand(4, 2 * GROUP) + shift
    q, scale, zero = quantize_int4(w)
    assert zero.max() <= 15 and q.max() <= 15
    assert (float_weights(q, scale, zero) - w).abs().max() <= (abs(shift) + 1) / 15 / 2 + 0.01


def test_two_numbers_in_a_byte_and_back():
    q = torch.randint(0, 16, (6, 64), dtype=torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(q)), q) and pack_int4(q).shape == (6, 32)


@pytest.mark.parametrize("layer", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("rows", [1, 6, 200])
def test_the_fast_path_agrees_with_the_readable_one(layer, rows):
    torch.manual_seed(0)
    linear = layer(torch.randn(96, 64) * torch.rand(96, 1))
    x = torch.randn(rows, 5, 64)
    wanted = x.double() @ linear.dequantize().double().T
    for name, y, most in (("readable", linear.readable(x), 1e-6), ("fast", linear(x), 0.01)):
        assert y.shape == wanted.shape and y.dtype == x.dtype
        error = ((y - wanted).norm() / wanted.norm()).item()
        assert error < most, f"{name}: relative error {error:.1e}; the fast one rounds to bfloat16"
    bits, is_fast = 8 if layer is Int8Linear else 4, 5 * rows <= packed.FEW
    assert has_kernel(bits, torch.device("cpu")), "torch has no kernel here: the fast path is untested"
    assert (error > 1e-5) == is_fast, f"{5 * rows} rows by the {'readable' if is_fast else 'fast'} path"


@pytest.mark.parametrize("layer", [Int8Linear, Int4Linear])
def test_one_compiled_row_makes_no_matrix_product(layer):
    torch.manual_seed(0)
    linear, x, products = layer(torch.randn(96, 64)), torch.randn(3, 64), []

    def look(graph, inputs):
        found = re.findall(r"linear|matmul|\bmm\b|einsum", " ".join(str(n.target) for n in graph.graph.nodes))
        products.append(found)
        return graph
    for rows in (x, x[:1]):
        y = torch.compile(linear.readable, backend=look, fullgraph=True, dynamic=False)(rows)
        wanted = rows.double() @ linear.dequantize().double().T
        assert (y - wanted).norm() < 1e-6 * wanted.norm(), f"{len(rows)} rows: another product when compiled"
    assert products[0], "several rows are a matrix product, or this test does not see one"
    assert not products[1], f"one row makes {products[1]}: all weights are written to memory as floats first"


@pytest.mark.parametrize("bits", [8, 4])
def test_without_a_kernel_the_readable_path_serves(bits, monkeypatch, capsys, checkpoint):
    model, ids = quantize_model(make(), bits), torch.randint(262, (2, 9))
    fast = model(ids)
    monkeypatch.setitem(packed.KERNELS, bits, ("no_such_kernel",))
    without = quantize_model(make(), bits)
    assert (without(ids) - fast).norm() < 0.02 * fast.norm()
    assert without.head.packed is None, "it packs for a kernel that is not there"
    sample.main(["--checkpoint", str(checkpoint), "--out", str(checkpoint.parent), "--device", "cpu",
                 f"--int{bits}", "--tokens", "3"])
    assert "the readable path serves" in capsys.readouterr().out


@pytest.mark.parametrize("bits,most", [(8, 0.04), (4, 0.4)])
def test_a_quantised_model_says_about_the_same(bits, most):
    model, ids = make(), torch.randint(262, (4, 30))
    wanted, found = model(ids), quantize_model(copy.deepcopy(model), bits)(ids)
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert 0 < error < most, f"int{bits}: the logits are off by {error:.1%}"


def test_all_matrices_are_packed():
    model = quantize_model(make(), 4)
    large = [name for name, p in model.named_parameters() if p.dim() > 1]
    assert not large, f"{large} stayed float"
    small = weight_bytes(model) / weight_bytes(make())
    assert small < 0.17, f"int4 takes {small:.2f} of float32's bytes"
    assert weight_bytes(make()) == 4 * count_parameters(SHAPE)


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained model whose tokens are bytes, as out/base.pt."""
    chain.save_checkpoint(tmp_path / "base.pt", config=dataclasses.asdict(SHAPE), weights=make().state_dict(),
                          tokenizer=Tokenizer([], SPECIAL_TOKENS).to_dict(), loss=5.5, step=3,
                          arguments={"seed": 0})
    return tmp_path / "base.pt"


def test_the_script_writes_small_files_that_load(checkpoint, text_file, capsys):
    metrics = quantize.main(["--out", str(checkpoint.parent), "--device", "cpu", "--data", str(text_file)])
    for bits in (8, 4):
        path = checkpoint.with_name(f"base.int{bits}.pt")
        model, _, content = load_model(path)
        assert content["bits"] == bits and content["step"] == 3
        ids = torch.randint(262, (1, 9))
        difference = (model(ids) - quantize_model(make(), bits)(ids)).abs().max()
        assert difference < 1e-5, f"int{bits}: the file holds another model"
        assert path.stat().st_size < checkpoint.stat().st_size
        assert metrics[f"int{bits}_loss_added"] < 0.1
    sample.main(["--checkpoint", str(path), "--out", str(path.parent), "--device", "cpu", "--tokens", "4"])


def test_where_groups_do_not_fit_there_is_no_int4(text_file, tmp_path, capsys):
    """And in a short context the tables are made all the same."""
    shape = dataclasses.replace(SHAPE, hidden=80, context=8)
    model, tokenizer = GPT(shape).eval(), Tokenizer([], SPECIAL_TOKENS)
    chain.save_checkpoint(tmp_path / "base.pt", config=dataclasses.asdict(shape), weights=model.state_dict(),
                          tokenizer=tokenizer.to_dict(), step=3, loss=5.0, arguments={})
    metrics = quantize.main(["--out", str(tmp_path), "--device", "cpu", "--data", str(text_file)])
    assert "int8_bytes" in metrics and "int4_bytes" not in metrics
    metrics = bench.measure(model, None, 0.0, False)
    assert "int8_1_tokens_per_second" in metrics and "int4_1_tokens_per_second" not in metrics
    assert "int4      none" in (said := capsys.readouterr().out) and "(no int4" in said


def test_what_users_get_wrong(checkpoint, fails, text_file, tmp_path):
    argv = ["--out", checkpoint.parent, "--device", "cpu", "--data", text_file]
    quantize.main([str(word) for word in argv])
    small = checkpoint.with_name("base.int8.pt")
    assert "8 bits already" in fails(quantize.main, [*argv, "--checkpoint", small])
    for flag in ("--int8", "--int4"):
        line = fails(sample.main, ["--checkpoint", small, "--out", tmp_path, "--device", "cpu", flag])
        assert "quantised already" in line and flag in line
    assert "choose one" in fails(sample.main, ["--out", tmp_path, "--int8", "--int4"])
    assert "nowhere.pt" in fails(quantize.main, [*argv, "--checkpoint", "nowhere.pt"])
    with pytest.raises(ValueError, match="multiple of the group"):
        quantize_int4(torch.ones(2, 33))


def test_one_huge_column_spoils_int8_and_is_kept_apart():
    """LLM.int8(): the reference's figures are 2.4 % and 0.29 % with a column of 30 times the others."""
    torch.manual_seed(0)
    x, w = torch.randn(256, 512), torch.randn(64, 512)
    usual = quantize.relative_error(quantize.int8_product(x, w), x @ w.T)
    assert usual < 0.015
    x[:, 7] *= 30
    spoilt = quantize.relative_error(quantize.int8_product(x, w), x @ w.T)
    apart = quantize.relative_error(quantize.llm_int8(x, w), x @ w.T)
    assert spoilt > 0.02 and apart < 0.012 and apart < spoilt / 2, f"{spoilt:.3f} and {apart:.3f}"


def test_nf4_levels_are_those_of_the_paper():
    """Appendix E of Dettmers 2023, to the digits of float32."""
    wanted = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
              0.7229568362236023, 1.0]
    assert quantize.nf4_levels().tolist() == pytest.approx(wanted, abs=2e-6)


def test_nf4_takes_the_nearest_level():
    torch.manual_seed(0)
    w, levels = torch.randn(8, 128), quantize.nf4_levels()
    q, scale = quantize.quantize_nf4(w)
    back = quantize.dequantize_nf4(q, scale, w.shape)
    assert quantize.relative_error(back, w) < 0.11
    for value, number, s in zip(w.view(-1, 64)[1, :9], q[1], scale[1].expand(9)):
        assert number == min(range(16), key=lambda i: abs(levels[i] * s - value)), "another level is nearer"
    assert (quantize.dequantize_nf4(*quantize.quantize_nf4(torch.zeros(1, 64)), (1, 64)) == 0).all()


def test_a_random_model_has_the_size_that_was_asked_for(fails, tmp_path):
    assert abs(count_parameters(random_model("15M").config) - 15e6) < 5e6
    for size in ("big", "M", "-3M", "0M", "1.2.3M"):
        assert f"--random {size}" in fails(sample.main, ["--bench", "--out", tmp_path, f"--random={size}"])
    assert "--bench" in fails(sample.main, ["--random", "2M", "--out", tmp_path])
