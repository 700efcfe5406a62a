"""`bench` on single calls: what it measures, what it makes of it, and that it catches faults.

No test here expects one thing to be faster than another: machines are busy.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from architectures import ARCHITECTURES
from mra_cli import methods
from mra_cli.bench.decoding import decode_step
from mra_cli.bench.plots import _STYLES, draw
from mra_cli.bench.report import BenchReport
from mra_cli.bench.rounding import NO_NUMBERS, heads_to_check, rounding_bound
from mra_cli.bench.scaling import growth_exponent, measured_break_even
from mra_cli.bench.single import BenchSetup, cases, computing_threads, run_bench, sdpa
from mra_cli.bench.summary import busy_notes
from mra_cli.bench.workload import PATTERNS, CapturedWorkload, RandomWorkload, decode_call
from mra_cli.checkpoint import Checkpoint
from mra_cli.environment import Environment
from mra_cli.errors import InputError
from mra_cli.methods import METHODS, make_method
from mra_cli.methods.mra import Mra
from mra_kernels import PRESETS, KeyPyramid, implementations

# --- calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_calls_have_the_shape_of_their_pattern(pattern):
    workload = RandomWorkload((pattern,), heads=4, kv_heads=2, head_dim=8, batch=3, seed=1)
    call, outline = workload.call(pattern, 100), workload.outline(pattern, 100)
    queries = 100 if pattern[1] == "S" else 50
    assert call.query.shape == outline.query.shape == (3, 4, queries, 8)
    assert call.key.shape == call.value.shape == outline.key.shape == (3, 2, 100, 8)
    seen = {"CS": 100 * 101 // 2}.get(pattern, queries * 100)
    assert call.legal_entries == outline.legal_entries == 3 * 4 * seen
    assert outline.key.untyped_storage().nbytes() <= 64, "an outline takes no memory"
    assert torch.equal(call.query, workload.call(pattern, 100).query), "the seed decides"
    assert not torch.equal(call.query, replace(workload, seed=2).call(pattern, 100).query)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_baseline_is_exact_attention(pattern):
    call = RandomWorkload((pattern,), 4, 2, 8, 2).call(pattern, 60)
    torch.testing.assert_close(sdpa(call), call.exact())
    capped = replace(call, softcap=5.0)
    torch.testing.assert_close(sdpa(capped), capped.exact())
    assert not torch.allclose(sdpa(capped), sdpa(call), atol=1e-3)


def test_decoding_asks_what_the_last_rows_ask():
    call = RandomWorkload(("CS",), 4, 2, 8, 2).call("CS", 60)
    last = decode_call(call, 3)
    assert (last.n_queries, last.n_keys) == (3, 60)
    torch.testing.assert_close(last.exact(), call.exact()[:, :, -3:])
    with pytest.raises(InputError, match="less than the cache"):
        decode_call(call, 60)


def test_captured_calls_are_what_the_model_computes():
    model = next(a for a in ARCHITECTURES if a.name == "llama-gqa").build()
    workload = CapturedWorkload.of(Checkpoint("tiny", model, _Words(), None, "none"), "1")
    assert workload.patterns == ("CS",)
    call = workload.call("CS", 96)
    outputs = []
    module = dict(model.named_modules())[workload.site.name]
    hook = module.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        model(**_Words.batch)
    hook.remove()
    torch.testing.assert_close(call.exact().transpose(1, 2).flatten(2), outputs[0])


class _Words:
    """A tokenizer of eighty ids; remembers what it was asked for last."""

    model_max_length = 128
    batch: ClassVar[dict] = {}

    def __call__(self, text, add_special_tokens=True):
        ids = [10 + ord(c) % 80 for c in text[:5000]]
        _Words.batch = {"input_ids": torch.tensor([ids[:96]])}
        return {"input_ids": ids}


@pytest.fixture(autouse=True)
def _same_window(monkeypatch):
    """Windows start at the text's first token, so that tests can feed the same."""
    real = torch.randint
    fixed = lambda high, size, **kw: real(high, size, **kw) * 0  # noqa: E731
    monkeypatch.setattr("mra_cli.inputs.torch.randint", fixed)


# --- a run -----------------------------------------------------------------------------------


def small(patterns=("CS",), lengths=(128,), names=("mra",), dtype=torch.float32, **setup):
    workload = RandomWorkload(tuple(patterns), 4, 2, 16, dtype=dtype)
    chosen = tuple(METHODS[name] for name in names)
    return run_bench(workload, BenchSetup(tuple(lengths), chosen, pairs=2, **setup))


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return small(("NS", "CS", "CC"), (128, 160, 192), ("mra", "mra2s"), budgets=(0.25, 1.0))


def test_figures_of_a_run_hang_together(report):
    assert len(report.rows) == 3 * 3 * 2 * 2
    for row in report.rows:
        assert row.status == "ok", row
        assert 0 < row.rounding < row.rounding_bound == rounding_bound(torch.float32)
        assert row.pairs == 2 and row.heads_checked == 4
        assert 0 < row.exact_p50_ms <= row.exact_p90_ms
        assert 0 < row.method_p50_ms <= row.method_p90_ms
        assert row.of_ideal == row.speedup / row.ideal_speedup
        assert row.exact_bytes >= 4 * row.n_queries * 16 * 4, "the output at least"
        if row.budget == 1.0:
            assert row.error < 1e-5 and row.density == pytest.approx(1.0)
            assert 0.6 < row.ideal_speedup <= 1.0, "estimates come on top"
        else:
            assert 0.01 < row.error < 3 and row.ideal_speedup > 1.1
    ahead = {row.pattern for row in report.rows if row.lookahead is not None}
    assert ahead == {"CS", "CC"}
    exact = [row.lookahead for row in report.rows if row.budget == 1.0 and row.lookahead]
    assert all(moved < 1e-5 for moved in exact), "at full budget nothing looks ahead"
    assert any("Random inputs have no structure" in note for note in report.notes)


def test_a_report_survives_json_and_fills_a_csv(report):
    assert BenchReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["rows"][0]["status"] == "ok"
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(rows) == len(report.rows)
    assert float(rows[3]["speedup"]) == report.rows[3].speedup
    assert rows[0]["status"] == "ok" and rows[0]["pattern"] == "NS"
    for text in ("{}", "[", '{"schema": 7}', "[]"):
        with pytest.raises(InputError):
            BenchReport.from_json(text)


def test_trends_follow_from_rows(report):
    assert len(report.trends) == 3 * 2 * 2
    trend = report.trends[0]
    rows = [row for row in report.rows if (row.pattern, *row.series) == ("NS", "mra", "0.25")]
    assert (trend.pattern, trend.method, trend.setting) == ("NS", "mra", "0.25")
    lengths = [row.n_keys for row in rows]
    times = [row.method_p50_ms for row in rows]
    assert trend.method_exponent == growth_exponent(lengths, times)
    assert trend.measured == measured_break_even(lengths, [row.speedup for row in rows])


def test_work_is_counted_entry_by_entry():
    """Without a coarse term: a score per pair of blocks, and one per exact entry."""
    call = RandomWorkload(("CS",), 4, 2, 16).call("CS", 128)
    method = make_method("mra2s", 0.3)
    result = method(call)
    blocks = 4 * (4 * 5 // 2)
    exact = round(float(result.density.mean()) * call.legal_entries)
    assert method.multiply_adds(call, result) == (blocks + exact) * (16 + 16)


def test_keys_per_row_mean_the_same_at_every_length():
    found = small(("NS", "CS"), (256, 512), keys_per_row=64)
    for row in found.rows:
        legal = row.n_keys if row.pattern == "NS" else (row.n_keys + 1) / 2
        assert row.density * legal == pytest.approx(64, rel=0.05)
        assert row.series == ("mra", "64 keys/row")
    assert len(found.trends) == 2


def test_forward_and_backward(monkeypatch):
    calls = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or real(*a, **k))
    (row,) = small(backward=True).rows
    assert row.impl == "reference" and row.status == "ok"
    assert len(calls) == 3 + 2 + 2 * 2, (
        "exact warmed up, weighed, timed; method weighed, timed; two pairs"
    )


def test_quick_calls_are_timed_more_often(monkeypatch):
    workload = RandomWorkload(("NS",), 1, 1, 8)
    setup = BenchSetup((64,), (METHODS["mra2"],))
    assert 10 < run_bench(workload, setup).rows[0].pairs <= 100
    monkeypatch.setattr("mra_cli.bench.single.QUICK_MS", 0.0)
    assert run_bench(workload, setup).rows[0].pairs == 10
    assert run_bench(workload, replace(setup, pairs=1)).rows[0].pairs == 1


def test_decoding_keeps_the_means_of_older_blocks(monkeypatch):
    """Each step takes in the newest rows alone, and says what the plain call says."""
    taken = []
    real = KeyPyramid.extend

    def extend(self, key, value, valid=None):
        taken.append(key.shape[2] - self.length)
        real(self, key, value, valid)

    monkeypatch.setattr(KeyPyramid, "extend", extend)
    call = decode_call(RandomWorkload(("CS",), 4, 2, 16).call("CS", 300), 2)
    method = make_method("mra3", 0.5, {"diagonal_blocks": "1"})
    step = decode_step(method, call)
    outputs = [step().output for _ in range(3)]
    if implementations()["native"] is not None:
        pytest.skip("no compiler")
    assert taken == [300, 2, 2]
    for output in outputs:
        torch.testing.assert_close(output, method(call).output)


def test_decoding():
    found = small(("CS", "CC"), decode=True, rows=2)
    assert [(row.n_queries, row.n_keys) for row in found.rows] == [(2, 128), (2, 128)]
    assert found.timed == "decode"
    assert "linear for exact attention" in found.trends[0].fitted.note
    assert any("decodes exactly where" in note for note in found.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_held_to_their_own_bound(dtype):
    (row,) = small(dtype=dtype).rows
    assert row.status == "ok"
    assert 1e-4 < row.rounding < row.rounding_bound == rounding_bound(dtype) < 0.03


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), computing_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_a_busy_machine_is_pointed_out():
    calm = replace(Environment.collect(), cpus=8, threads=2, load=0.5)
    assert busy_notes(calm) == []
    assert "busy" in busy_notes(replace(calm, load=7.5))[0]
    assert "16 threads share 8 CPUs" in busy_notes(replace(calm, threads=16))[0]


def test_refusals_are_known_before_anything_runs(monkeypatch):
    monkeypatch.setattr(RandomWorkload, "call", lambda *a: pytest.fail("made inputs"))
    setup = BenchSetup((16, 128), (METHODS["mra2"],), (0.5,))
    found = cases(RandomWorkload(("NS", "NC")), setup)
    assert [case.refusal is None for case in found] == [False, True, False, True]
    assert "less than two blocks" in found[0].refusal
    native = (methods.with_impl(METHODS["mra2"], "reference"),)
    assert cases(RandomWorkload(("NS",)), replace(setup, methods=native))[1].refusal is None
    found = cases(RandomWorkload(("NS", "CS")), replace(setup, decode=True))
    assert "no decoding" in found[0].refusal and found[-1].refusal is None


# --- faults ----------------------------------------------------------------------------------


class Faulty(Mra):
    """Right but for one number of the first head."""

    value = 0.5

    def __call__(self, call):
        result = super().__call__(call)
        result.output[0, 0, 7, 3] += self.value
        return result


class Hungry(Mra):
    """Needs more memory than there is, at lengths over 128."""

    def __call__(self, call):
        if call.n_keys > 128:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return super().__call__(call)


@pytest.mark.parametrize(("value", "least"), [(0.5, 1e-3), (float("nan"), NO_NUMBERS)])
def test_a_wrong_output_fails_its_row(monkeypatch, value, least):
    monkeypatch.setattr(Faulty, "value", value)
    monkeypatch.setitem(METHODS, "mra3", Faulty("mra3", PRESETS["mra3"]))
    found = small(names=("mra3", "mra2"))
    assert [row.status for row in found.rows] == ["FAILED", "ok"]
    assert found.failed[0].rounding >= least
    assert BenchReport.from_json(found.to_json()) == found


def test_the_command_fails_with_its_rows(cli, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "mra3", Faulty("mra3", PRESETS["mra3"]))
    line = "bench --seq-len 128,192 --pattern CS --budget 0.5 --pairs 1 --heads 2 --method mra3"
    ran = cli(*line.split(), "--json", tmp_path / "it.json")
    assert ran.code == 1
    assert "FAILED" in ran.out and "please report it" in ran.out
    rows = json.loads((tmp_path / "it.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["FAILED", "FAILED"]


def test_running_out_of_memory_is_a_refusal(monkeypatch):
    monkeypatch.setitem(METHODS, "mra3", Hungry("mra3", PRESETS["mra3"]))
    found = small(lengths=(128, 256), names=("mra3", "mra2"))
    assert [(row.method, row.n_keys) for row in found.rows] == [
        ("mra3", 128),
        ("mra2", 128),
        ("mra2", 256),
    ]
    assert [(r.method, r.n_keys, r.reason) for r in found.refused] == [
        ("mra3", 256, "out of memory")
    ]


def test_too_long_to_check_is_not_called_ok(monkeypatch):
    monkeypatch.setattr("mra_cli.bench.rounding.MOST_ENTRIES", 100)
    found = small()
    assert found.rows[0].status == "not checked" and found.failed == []
    assert any("Not checked" in note and "128" in note for note in found.notes)


def test_heads_that_share_keys_are_checked_together(monkeypatch):
    call = RandomWorkload(("NS",), 6, 2, 16).call("NS", 64)
    result = METHODS["mra2"].with_budget(0.5)(call)
    per_head = 64 * 64 / 2
    for enough, expected in ((1, 3), (5 * per_head, 3), (6 * per_head, 6)):
        monkeypatch.setattr("mra_cli.bench.rounding.ENOUGH_ENTRIES", enough)
        assert heads_to_check(call, result) == expected


# --- drawings and the command ----------------------------------------------------------------


def test_drawings_hold_every_series(report):
    pytest.importorskip("matplotlib")
    svg = draw(report, "svg").decode()
    for text in ("exact", "mra at 0.25", "mra2s at 1", "speed-up against error", "CC: latency"):
        assert text in svg
    assert draw(report, "svg").decode() == svg
    png = draw(report, "png")
    assert png.startswith(b"\x89PNG") and len(png) > 20_000


def test_drawings_do_without_colour():
    for key in ("marker", "linestyle", "color"):
        assert len({str(style[key]) for style in _STYLES}) == len(_STYLES)


def test_a_break_even_is_circled(report):
    pytest.importorskip("matplotlib")
    from mra_cli.bench.summary import trends

    def drawing(ratio):
        rows = [replace(row, speedup=ratio(row)) for row in report.rows if row.pattern == "NS"]
        rows = [row for row in rows if row.series == ("mra", "0.25")]
        changed = replace(report, rows=tuple(rows), trends=trends(rows, "forward"))
        return draw(changed, "svg").decode()

    never = drawing(lambda row: 0.5)
    late = drawing(lambda row: 2.0 if row.n_keys > 130 else 0.5)
    assert "mra at 0.25 (slower throughout)" in never
    assert "mra at 0.25 (from 160" in late
    assert late.count("PathCollection") == never.count("PathCollection") + 1


def test_the_command_writes_everything_it_is_asked_for(cli, tmp_path):
    pytest.importorskip("matplotlib")
    line = "bench --seq-len 100 --pattern NS,CS --method mra,mra2,mra2s --budget 0.25 --heads 2"
    line += " --pairs 1"
    files = (
        "--json",
        tmp_path / "a.json",
        "--csv",
        tmp_path / "b.csv",
        "--plot",
        tmp_path / "c.SVG",
    )
    ran = cli(*line.split(), *files)
    assert ran.code == 0, ran
    for text in (
        "NS: noncausal self-attention",
        "break-even",
        "two blocks",
        "speed-up",
        "computed by",
    ):
        assert text in ran.out
    found = BenchReport.from_json((tmp_path / "a.json").read_text())
    assert {(row.n_keys, row.method) for row in found.rows} >= {(50, "mra"), (200, "mra2s")}
    assert {(r.n_keys, r.method) for r in found.refused} == {(50, "mra2"), (50, "mra2s")}
    assert (tmp_path / "b.csv").read_text().count("\n") == len(found.rows) + 1
    assert "<svg" in (tmp_path / "c.SVG").read_text()


def test_a_dry_run_times_nothing(cli, monkeypatch):
    monkeypatch.setattr("mra_cli.bench.single.run_bench", lambda *a, **k: pytest.fail("ran"))
    ran = cli(*["bench", "--dry-run", "--pattern", "NC,CS", "--seq-len", "16,64", "--json", "-"])
    assert ran.code == 0, ran
    runs = json.loads(ran.out)["runs"]
    assert len(runs) == 2 * 2 * 2
    assert [bool(run["refused"]) for run in runs] == [True] * 2 + [False] * 2 + [True] * 2 + [
        False
    ] * 2
