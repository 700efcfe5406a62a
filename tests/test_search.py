"""The search: the frontier is optimal, the state survives, plans hold, and 'no' is an answer."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

from cli_support import python
from mra_cli.errors import InputError
from mra_cli.evaluate import Damage
from mra_cli.methods import make_method
from mra_cli.report import read_plan
from mra_cli.search import SearchReport, SearchSetup, Target, search
from mra_cli.search.frontier import Option, frontier, thinned
from mra_cli.search.journal import Journal
from mra_cli.search.probing import break_even
from mra_cli.search.report import LengthSpeed
from mra_cli.texts import read_texts, split_samples

# --- the frontier ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["density", "latency"])
@pytest.mark.parametrize("seed", range(5))
def test_no_plan_beats_a_point_of_the_frontier(kind, seed):
    chance = random.Random(seed)
    sites = []
    for _ in range(4):
        ways = [
            Option(0.1 * k, chance.random() / k, 0.1 * k + 0.01 * chance.random(), chance.random())
            for k in range(1, 5)
        ]
        sites.append([*ways, Option(1.0, 0.0, 1.0, 1.0)])
    points = frontier(sites, kind)
    assert points[-1].harm == 0.0 if kind == "density" else points[-1].harm <= points[0].harm
    costs = [point.cost(kind) for point in points]
    assert costs == sorted(costs) and len(points) > 4
    everything = list(itertools.product(*sites))
    for point in points:
        for plan in everything:
            if sum(way.cost(kind) for way in plan) <= point.cost(kind) - 1e-9:
                assert sum(way.harm for way in plan) > point.harm


def test_points_are_what_they_say():
    sites = [[Option(0.1, 0.4, 0.05, 1.0), Option(1.0, 0.0, 0.5, 3.0)]] * 2
    first, second, third = frontier(sites)
    assert first.budgets == (0.1, 0.1) and third.budgets == (1.0, 1.0)
    assert sorted(second.budgets) == [0.1, 1.0]
    assert (second.harm, second.density, second.ms) == pytest.approx((0.4, 0.55, 4.0))


def test_thinning_keeps_the_ends_and_what_was_run():
    assert thinned(100, 10, {3, 57}) == sorted({*range(0, 100, 10), 99, 3, 57})
    assert thinned(3, 10, set()) == [0, 1, 2]


# --- targets and state -----------------------------------------------------------------------

LM = Damage(loss=2.02, loss_exact=2.0, kl=0.02, top1_agreement=0.9)


@pytest.mark.parametrize(
    ("target", "damage", "excess"),
    [
        (Target("max-loss-increase", 0.01), LM, 1.0),
        (Target("max-kl", 0.01), LM, 2.0),
        (Target("min-agreement", 0.95), LM, 4.0),  # squared: disagreement grows with the root
        (Target("min-cosine", 0.99), Damage(cosine_mean=0.995, cosine_min=0.9), 0.5),
        (Target("max-output-change", 0.1), Damage(output_change=0.05), 0.25),
        (Target("density", 0.2), LM, 1.5),
        (Target("max-loss-increase", 0.01), Damage(1.9, 2.0, 0.1, 0.9), 0.0),
    ],
)
def test_excess_is_harm_over_harm_allowed(target, damage, excess):
    assert target.excess(damage, 0.3) == pytest.approx(excess)


def test_targets_that_say_nothing_of_a_model_are_refused():
    with pytest.raises(InputError, match=r"no embedding cosine.*--max-loss-increase or --max-kl"):
        Target("min-cosine", 0.99).check_fits(LM, "it")


def test_a_state_is_gone_on_with_and_bound_to_its_search(tmp_path):
    path, counted = tmp_path / "it.state", []

    def measure() -> float:
        counted.append(1)
        return 0.5

    for _ in range(2):
        journal = Journal(path, {"model": "a", "budgets": (0.1, 0.2)})
        assert journal.get("x", measure) == 0.5
    assert len(counted) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["it.state"]
    with pytest.raises(InputError, match="another model"):
        Journal(path, {"model": "b", "budgets": (0.1, 0.2)})
    path.write_text("{")
    with pytest.raises(InputError, match="must be the state of a search"):
        Journal(path, {})


def test_break_even_is_where_it_was_measured():
    speeds = [LengthSpeed(n, n * n / 1e3, n / 2) for n in (128, 256, 512, 1024, 2048)]
    length, words = break_even(speeds)
    assert length == 512 or (length == 1024 and "Break-even" in words)
    assert speeds[2].exact_ms > speeds[2].method_ms and length == 512
    length, words = break_even([LengthSpeed(n, 1.0, 2.0) for n in (128, 256)])
    assert length == 0 and "No time is saved" in words
    assert break_even([])[0] == 0


# --- on a real model -------------------------------------------------------------------------


def sides(checkpoint, length=128):
    return split_samples(
        checkpoint, read_texts([]), None, given=False, seq_len=length, count=2, seed=0
    )


def setup(*targets, **options):
    return SearchSetup(make_method("mra", 0.25), targets, budgets=(0.1, 0.25, 0.5), **options)


@pytest.fixture(scope="module")
def found(minilm, tmp_path_factory):
    state = tmp_path_factory.mktemp("search") / "it.state"
    target = Target("min-cosine", 0.985)
    return search(minilm, *sides(minilm), setup(target), state=state), state


@pytest.mark.checkpoints
def test_a_plan_holds_on_text_the_search_has_not_seen(found, minilm):
    report, _ = found
    assert report.plan is not None and report.verified is not None
    assert report.verified.held_out and report.verified.holds
    assert report.verified.damage.cosine_mean >= 0.985
    assert report.provenance.inputs != report.held_out
    assert 0.1 <= report.verified.density < 1.0
    assert SearchReport.from_json(report.to_json()) == report
    by_hand = report.made_plan()
    from mra_cli.evaluate import Judge
    from mra_cli.patching import patched

    held_out = sides(minilm)[1]
    judge = Judge(minilm.model, held_out.batches, minilm.tokenizer)
    with patched(minilm.model, by_hand.with_min_length(0)):
        assert judge.judge() == report.verified.damage


@pytest.mark.checkpoints
def test_cheaper_plans_of_the_frontier_fail(found):
    """Else it would not be the cheapest. What held on the search's inputs may fail on others, and
    be made tighter for that: then it is there that the next cheaper one fails."""
    report, _ = found
    verified = [trial for trial in report.trials if trial.held_out]
    side = verified if len(verified) > 1 else [t for t in report.trials if not t.held_out]
    chosen = report.frontier[report.chosen]
    cheaper = [t for t in side if report.frontier[t.point].density < chosen.density]
    assert cheaper and all(not trial.holds for trial in cheaper)
    assert chosen.density - max(report.frontier[t.point].density for t in cheaper) < 0.12


@pytest.mark.checkpoints
def test_sensitive_sites_get_more(found):
    """Budgets follow harm, not depth: the site that hurts most alone is not among the leanest."""
    report, _ = found
    budgets = report.frontier[report.chosen].budgets
    harm = [group.harm for group in report.sensitivities]
    assert budgets[harm.index(max(harm))] == max(budgets)
    assert report.verified.damage.harm < 1.05 * report.uniform.harm


@pytest.mark.checkpoints
def test_a_state_spares_the_measurements(found, minilm, monkeypatch):
    report, state = found
    import mra_cli.search.workbench as workbench

    def refuse(*_args, **_options):
        raise AssertionError("measured again")

    monkeypatch.setattr(workbench, "measure_layers", refuse)
    monkeypatch.setattr(workbench, "joint_run", refuse)
    again = search(minilm, *sides(minilm), setup(*report.targets), state=state)
    assert again.plan == report.plan
    with pytest.raises(AssertionError, match="measured again"):  # other targets run other plans
        search(minilm, *sides(minilm), setup(Target("min-cosine", 0.96)), state=state)


@pytest.mark.checkpoints
def test_no_plan_is_an_answer(found, minilm):
    _, state = found
    report = search(minilm, *sides(minilm), setup(Target("min-cosine", 0.999999)), state=state)
    assert report.plan is None and report.chosen is None and report.verified is None
    assert report.answer.startswith("No plan")
    assert SearchReport.from_json(report.to_json()) == report
    report = search(minilm, *sides(minilm), setup(Target("density", 0.05)), state=state)
    assert report.plan is None and "0.1" in report.answer


@pytest.mark.checkpoints
def test_a_density_is_spent_and_not_exceeded(found, minilm):
    _, state = found
    report = search(minilm, *sides(minilm), setup(Target("density", 0.3)), state=state)
    assert 0.2 < report.verified.density <= 0.3
    target = Target("min-cosine", 0.999999)
    both = search(minilm, *sides(minilm), setup(Target("density", 0.3), target), state=state)
    assert both.plan is None


@pytest.mark.checkpoints
def test_time_runs_out_in_one_line(minilm, tmp_path):
    state = tmp_path / "it.state"
    quick = setup(Target("min-cosine", 0.985), time_limit_s=0.01)
    with pytest.raises(InputError, match=r"time is up.*go on from .*it\.state"):
        search(minilm, *sides(minilm), quick, state=state)
    kept = json.loads(state.read_text())["results"]
    assert kept["sites at a time"] == 6, "all together, since time was short"


@pytest.mark.checkpoints
def test_a_plan_goes_all_the_way(cli, minilm, tmp_path):
    """Found, written, patched, and what is patched is what was found."""
    plan, drawing = tmp_path / "plan.json", tmp_path / "frontier.svg"
    options = ["--seq-len", 128, "--samples", 1, "--budget", "0.25,0.5", "--out", plan]
    ran = cli("search", "demo:minilm", "--min-cosine", "0.95", *options, "--plot", drawing)
    assert ran.code == 0, ran
    assert "A plan keeps embedding cosine at least 0.95" in " ".join(ran.out.split())
    assert drawing.read_text().count("</svg>") == 1
    sites = json.loads(plan.read_text())["sites"]
    assert len(sites) == 6 and {site["budget"] for site in sites.values()} <= {0.25, 0.5}
    target = tmp_path / "patched"
    ran = cli("patch", "demo:minilm", "--plan", plan, "--out", target, "--seq-len", 128)
    assert ran.code == 0, ran
    from mra_cli.plan import Plan

    written = Plan.from_dict(json.loads((target / "mra_plan.json").read_text()))
    assert written == read_plan(plan, None)
    ran = cli("search", "demo:minilm", "--min-cosine", "0.999999", *options)
    assert ran.code == 1 and "Error: No plan that saves" in ran.err
    assert "plan.json" in ran.out + ran.err


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_plan(tmp_path):
    script = Path(__file__).with_name("kill_search.py")

    def run(name: str, lives: int) -> subprocess.CompletedProcess[str]:
        arguments = python(script, tmp_path / name, lives)
        return subprocess.run(**arguments, capture_output=True, text=True, check=False)

    whole = run("whole", 0)
    assert whole.returncode == 0, whole.stderr
    codes = []
    while not codes or (codes[-1] == -signal.SIGKILL and len(codes) < 20):
        ran = run("killed", 3)
        codes.append(ran.returncode)
        assert {p.name for p in tmp_path.iterdir()} <= {"whole", "killed"}
    assert codes[-1] == 0 and len(codes) > 2, (codes, ran.stderr)
    plans = (json.loads(done.stdout)["sites"] for done in (whole, ran))
    first, second = ({n: {**site, "min_length": 0} for n, site in p.items()} for p in plans)
    assert first == second, "but for break-even, which is a matter of time"
