"""What is foreseen of a comparison: exact runs and FLOPs, the interval of simulated studies, refusals."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from einlinear.lab.compare import Plan, default_plan
from einlinear.lab.data import Sequences, load
from einlinear.lab.forecast import NOISE, RESOLVED, SLOPE, Expected, Forecast, Part, expected, forecast
from einlinear.lab.machine import TURNS, Machine
from einlinear.lab.models import counted
from einlinear.lab.run import Run
from einlinear.lab.train import Recipe

HERE = Machine(workers=0)
PLAN = Plan(
    families=("dense", "low_rank(rank=2)"),
    widths=(24, 16),
    depth=1,
    horizons=(1600, 640),
    rates=(0.01, 0.02, 0.04),
    tuning=320,
    recipe=Recipe(batch=2, base_width=16, base_depth=1, head=8, warmup=5),
)


def test_runs_and_flops_are_those_that_will_be_trained(task: Sequences) -> None:
    found = forecast(PLAN, task, HERE)
    assert [(part.family, part.trials, part.runs) for part in found.parts] == [
        ("dense", 3, 4),
        ("low_rank(rank=2)", 3, 4),
    ]
    steps = {"tune": 20, "measure": 80 + 8 + 20}
    for part in found.parts:
        flops = 0
        for trunk in [*PLAN.trials(task), *PLAN.trunks(task, dict.fromkeys(PLAN.families, 1.0))]:
            assert trunk.steps == steps[trunk.purpose]
            if trunk.family == part.family:
                flops += 3 * counted(task, trunk.architecture)[1].total * steps[trunk.purpose] * 16
        assert part.flops == flops
        assert part.seconds > 0
    text = str(found)
    assert f"in all {sum(part.flops for part in found.parts):.2g} training FLOPs" in text
    assert "each tuned at width 16 over 3 rates (6 runs)" in text and "(8 runs)" in text and "minutes" in text
    assert f"over and times {Expected().factor(2, 1):.2f}" in text


def test_a_given_rate_needs_no_tuning(task: Sequences) -> None:
    found = forecast(replace(PLAN, rates=(0.01,)), task, HERE)
    assert [part.trials for part in found.parts] == [0, 0]
    assert "tuned" not in str(found) and "grid" not in str(found)


@pytest.mark.parametrize(("widths", "seeds"), [(4, 1), (12, 1), (4, 3)])
def test_the_interval_is_that_of_simulated_studies(widths: int, seeds: int) -> None:
    """Two parallel lines of so many widths, each the mean of its seeds: the shift's error is foretold within 20 %."""
    random = np.random.default_rng(0)
    cost = np.tile(np.linspace(-2, 2, widths), 2)
    group = np.repeat([0.0, 1.0], widths)
    design = np.stack([np.ones(2 * widths), cost, group], axis=1)
    noise = NOISE * random.normal(size=(2 * widths, 4000, seeds)).mean(axis=2)
    shift = np.linalg.lstsq(design, -SLOPE * (cost + 0.4 * group)[:, None] + noise)[0][2] / -SLOPE
    times = stats.t.ppf(0.975, 2 * widths - 4)
    assert math.log(Expected().factor(widths, seeds)) == pytest.approx(times * shift.std(), rel=0.2)


def test_more_widths_and_more_seeds_narrow_it() -> None:
    for factors in ([Expected().factor(n, 1) for n in (2, 4, 8, 64)], [Expected().factor(4, n) for n in (1, 2, 8)]):
        assert factors == sorted(factors, reverse=True)


def stored(task: Sequences, noise: float, common: float, seeds: int, slope: float = 0.15) -> list[Run]:
    """Runs of a store: loss falls as cost^-slope, and seeds move single runs and, alike, all runs of theirs."""
    random = np.random.default_rng(1)
    alike = common * random.normal(size=seeds)
    return [
        Run(
            task=task.name, fingerprint=task.fingerprint, family=family, width=width, depth=1, tokens=tokens, rate=0.01,
            seed=seed, flops=width**2 * tokens, parameters=width**2,
            loss=(width**2 * tokens) ** -slope * math.exp(alike[seed] + noise * random.normal()),
        )
        for family in PLAN.families for width in (16, 18, 20, 22, 24) for tokens in (640, 1600)
        for seed in range(seeds)
    ]  # fmt: skip


def test_noise_and_slope_are_those_of_stored_runs_where_there_are_any(task: Sequences) -> None:
    known = expected(PLAN, task, stored(task, noise=0.005, common=0.05, seeds=4))
    assert known.noise == pytest.approx(0.005, rel=0.4) and known.slope == pytest.approx(0.15, rel=0.1)
    assert known.noise_from == "40 stored runs" and "2 stored structures" in known.slope_from
    text = str(forecast(PLAN, task, HERE, stored(task, noise=0.005, common=0.05, seeds=4)))
    assert "(40 stored runs)" in text and "(small byte models)" not in text
    single = expected(PLAN, task, stored(task, noise=0.001, common=0.0, seeds=1))
    assert single.noise == NOISE and single.slope == pytest.approx(0.15, rel=0.1)


def test_runs_that_are_far_from_the_plan_tell_nothing(task: Sequences) -> None:
    runs = stored(task, noise=0.005, common=0.05, seeds=4)
    for plan in (replace(PLAN, widths=(256, 512)), replace(PLAN, horizons=(10**6,)), replace(PLAN, depth=2)):
        assert expected(plan, task, runs) == Expected()
    assert expected(PLAN, replace(task, name="other"), runs) == Expected()
    assert expected(PLAN, replace(task, fingerprint="other"), runs) == Expected()


def blurred(**changes: object) -> str | None:
    return Forecast(replace(PLAN, **changes), HERE, ()).refusal()


def test_plans_that_cannot_answer_are_refused_with_a_remedy() -> None:
    assert "nothing to compare it with" in (blurred(families=("dense",)) or "")
    assert "4 sizes together, at 1 width(s)" in (blurred(widths=(16,)) or "")
    refusal = blurred() or ""
    assert "cannot tell a multiplier of 1.4 from 1" in refusal
    seeds = int(refusal.split("take ")[1].split()[0])
    assert blurred(seeds=tuple(range(seeds))) is None
    assert blurred(seeds=tuple(range(seeds - 1)))
    factor = float(refusal.split("--resolve ")[1].rstrip("."))
    assert Forecast(PLAN, HERE, ()).refusal(factor + 0.01) is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_plans_can_answer(device: str) -> None:
    plan = default_plan(load("teacher"), device)
    assert Forecast(plan, HERE, ()).refusal(RESOLVED) is None


def test_processes_on_one_gpu_are_no_machines_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take turns, or with MPS share its multiprocessors; on cores and in a cluster each has its own."""
    gpu = Machine(device="cuda", graphed=True)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert [replace(gpu, workers=n).at_once for n in (0, 1, 2, 8)] == [1.0, 1.0, TURNS, TURNS]
    (tmp_path / "control").touch()
    shared = [replace(gpu, workers=n).at_once for n in (1, 2, 3, 4, 8, 16)]
    assert shared == sorted(shared) and shared[0] == 1 and shared[1] > TURNS and shared[-1] < 2
    assert Machine(workers=8).at_once == replace(gpu, workers=8, engine="ray").at_once == 8
    part = Part("dense", 0, 1, 1, 600.0)
    assert Forecast(PLAN, replace(gpu, workers=4), (part,)).minutes == pytest.approx(10 / shared[3])
