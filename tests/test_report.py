"""`opt.report()`: every number against a dense float64 reference, at no cost and no change where nobody asks."""

import copy
import io
import math
import subprocess
import sys

import matplotlib
import pytest
import rich.console
import torch
from models import Mixed, attached, mlp, train
from torch import nn

import gradlr
from gradlr import ArgumentError, NonFiniteError
from gradlr.linalg import spectral_norm
from gradlr.report.metrics import direction_energy
from gradlr.rules import TrackedMomentum, Update

matplotlib.use("Agg")


class Everything(nn.Module):
    """Tables, norms, Linear, convolution, and a batch of matrices (experts)."""

    def __init__(self):
        super().__init__()
        self.mixed = Mixed()
        self.experts = nn.Parameter(torch.randn(3, 11, 6) / 3)

    def forward(self, tokens):
        return torch.einsum("b l v, e v o -> b l e o", torch.tanh(self.mixed(tokens)), self.experts)


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (4, 7), generator=generator)
    target = torch.randn(4, 7, 3, 6, generator=generator, dtype=torch.float64)
    return (model(tokens) - target).square().mean()


def everything(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model, tracker = Everything().to(dtype), gradlr.LossTracker()
    options = {"lr": 1e-2, "rank": 3, "momentum_rank": 2, "rule": TrackedMomentum(residual=0)} | options
    return model, tracker, gradlr.attach(model, tracker, **options)


def step(model, tracker, opt, seed, micro_batches):
    """One step; returns the dense gradients, as plain torch makes them, and the weights before."""
    twin = copy.deepcopy(model).requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for part in range(micro_batches):
        (loss_of(twin, 10 * seed + part) / micro_batches).backward()
        (tracker(loss_of(model, 10 * seed + part)) / micro_batches).backward()
    opt.step()
    return {name: parameter.grad for name, parameter in twin.named_parameters()}, before


def viewed(opt, name, tensor):
    return next(record.plan.view.of(tensor) for record in opt.records if record.plan.name == name)


def stable_rank(matrices):
    values = torch.linalg.svdvals(matrices.double())
    return (values.square().sum(dim=-1) / values[..., 0].square()).mean().item()


def captured(gradient, direction, rank):
    basis = torch.linalg.svd(direction, full_matrices=False).U[..., :rank]
    return ((basis.mT @ gradient).square().sum() / gradient.square().sum()).item()


STRATEGIES = [
    ("backward", "hook", 1), ("backward", "adaptor", 1), ("step", "hook", 1), ("step", "hook", 3), ("step", "adaptor", 1),
    ("step", "adaptor", 3),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:capture=:gradlr.GradlrWarning")  # the layers are so small that hooks would be faster
@pytest.mark.parametrize(("apply", "capture", "micro_batches"), STRATEGIES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_numbers_are_those_of_the_dense_gradient_and_of_the_change(apply, capture, micro_batches, weight_decay):
    model, tracker, opt = everything(apply=apply, capture=capture, weight_decay=weight_decay)
    step(model, tracker, opt, 0, micro_batches)
    with opt.observe():
        gradients, before = step(model, tracker, opt, 1, micro_batches)
    report = opt.report()
    rates = {record.plan.name: opt.param_groups[record.group_index] for record in opt.records}
    assert {row.kind for row in report.rows} == {"matrix", "embedding", "vector"}
    for row in report.rows:
        gradient, weight = viewed(opt, row.name, gradients[row.name]), viewed(opt, row.name, before[row.name])
        after = viewed(opt, row.name, model.get_parameter(row.name).detach())
        change = after - weight
        # float64 throughout: what is left is rounding, and that of the weights themselves in their change.
        assert row.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-10), row.name
        assert row.update_norm == pytest.approx(change.norm().item(), rel=1e-10), row.name
        assert row.weight_norm == pytest.approx(after.norm().item(), rel=1e-12)
        assert row.observed_step == row.steps == 2 and not row.is_projected
        expected = (change.norm() / weight.norm()).item() if weight.any() else None
        assert row.relative_update == pytest.approx(expected, rel=1e-10)
        if row.kind == "vector":
            assert row.stable_rank is row.energy is row.rank is None
            continue
        assert row.stable_rank == pytest.approx(stable_rank(gradient), rel=1e-9), row.name
        if row.kind == "matrix":
            direction = change + rates[row.name]["lr"] * rates[row.name]["weight_decay"] * weight
            assert row.energy == pytest.approx(captured(gradient, direction, row.rank), rel=1e-9), row.name
            assert 0.2 < row.energy < 0.9999
        else:
            assert row.energy is None and row.rank is None
    matrices = [row for row in report.rows if row.kind == "matrix"]
    total = sum(row.gradient_norm**2 for row in matrices)
    assert report.energy == pytest.approx(sum(row.energy * row.gradient_norm**2 for row in matrices) / total)
    assert report.gradient_norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in gradients.values())), rel=1e-9)


@pytest.mark.filterwarnings("ignore:capture=:gradlr.GradlrWarning")
@pytest.mark.parametrize("apply", ["backward", "step"])
def test_one_sided_capture_tells_the_norm_of_the_projection_and_no_share(apply):
    model, tracker, opt = everything(apply=apply, capture="one_sided")
    twin = copy.deepcopy(model)
    loss_of(twin, 0).backward()
    before = model.mixed.mix.weight.detach().clone()
    record = next(record for record in opt.records if record.plan.name == "mixed.mix.weight")
    with opt.observe():
        loss = tracker(loss_of(model, 0))
        basis = opt.bases.held(record)
        loss.backward()
        opt.step()
    row = next(row for row in opt.report().rows if row.name == record.plan.name)
    projection = twin.mixed.mix.weight.grad @ basis @ basis.mT
    assert row.is_projected and row.energy is None
    assert row.gradient_norm == pytest.approx(projection.norm().item(), rel=1e-9)
    assert row.stable_rank == pytest.approx(stable_rank(projection), rel=1e-9)
    assert row.update_norm == pytest.approx((model.mixed.mix.weight - before).norm().item(), rel=1e-9)
    assert "(p)" in str(opt.report()) and "of a projection" in str(opt.report())


def test_accumulated_gradients_are_scaled_with_the_step():
    model, tracker, opt = everything(apply="step", max_grad_norm=1e-3)
    with opt.observe():
        step(model, tracker, opt, 0, 2)
    assert opt.report().gradient_norm == pytest.approx(1e-3, rel=0.2)  # the limit is on the norm of the sketches
    assert opt.grad_norm > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_update_with_residual_is_measured_before_it_is_rounded(dtype, weight_decay, monkeypatch):
    model, tracker, opt = attached(mlp(dtype=dtype), weight_decay=weight_decay, lr=0.1)
    changes = []

    def spy(parameter, view, update, *, lr, weight_decay, generator):
        direction = update.dense.double()
        if update.left is not None:
            direction = direction + update.left.double() @ update.right.double().mT
        changes.append((lr * (direction + weight_decay * parameter.detach().double())).norm().item())

    monkeypatch.setattr(opt, "_write", spy)
    with opt.observe():
        tracker(model(torch.ones(8, 16, dtype=dtype)).square().mean()).backward()
    rows = {row.update_norm for row in opt.report().rows}
    assert len(changes) == len(opt.records)
    # float32 products.
    assert sorted(rows) == pytest.approx(sorted(changes), rel=1e-5)


@pytest.mark.filterwarnings("ignore:capture=:gradlr.GradlrWarning")
@pytest.mark.parametrize(
    ("apply", "capture", "micro_batches"), [*STRATEGIES, ("backward", "one_sided", 1), ("step", "one_sided", 2)]
)
def test_observing_changes_no_bit(apply, capture, micro_batches):
    ends = []
    for is_observed in (False, True):
        options = {"apply": apply, "capture": capture, "rule": "tracked_momentum", "weight_decay": 0.1}
        model, tracker, opt = everything(torch.float32, **options)
        torch.manual_seed(5)
        if is_observed:
            opt.observe()
        for seed in range(4):
            for part in range(micro_batches):
                tokens = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(10 * seed + part))
                (tracker(model(tokens).square().mean()) / micro_batches).backward()
            opt.step()
            if is_observed:
                opt.report()
        ends.append([*model.state_dict().values(), *(v for s in opt.state.values() for v in s.values()), torch.get_rng_state()])
        assert opt.report().is_observed == is_observed
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_nothing_is_done_where_nobody_asks(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("observed")

    for name in ("kept", "seen_gradient", "seen_update"):
        monkeypatch.setattr(f"gradlr.engine.commit.{name}", refuse)
    model, tracker, opt = attached(mlp(64), apply="step")
    tracker(model(torch.randn(8, 64)).square().mean()).backward()
    sketches = [opt.pending.gradients.get(record.index) for record in opt.records if record.plan.kind == "matrix"]
    assert all(isinstance(one, gradlr.gradient.Sketched) and one.whole is None for one in sketches)
    opt.step()
    assert not opt.report().is_observed and "with opt.observe()" in str(opt.report())
    opt.observe("0.weight")
    tracker(model(torch.randn(8, 64)).square().mean()).backward()
    with pytest.raises(AssertionError, match="observed"):
        opt.step()


def test_whole_gradients_are_dropped_with_the_step():
    model, tracker, opt = attached(mlp(64), apply="step")
    with opt.observe("0.weight"):
        tracker(model(torch.randn(8, 64)).square().mean()).backward()
        assert [
            record.plan.name
            for record in opt.records
            if getattr(opt.pending.gradients.get(record.index), "whole", None) is not None
        ] == ["0.weight"]
        opt.step()
    assert all(record.index not in opt.pending.gradients for record in opt.records)
    assert all(value.ndim == 0 for value in vars(opt.records[0].observed).values() if isinstance(value, torch.Tensor))


def test_a_window_that_has_begun_unobserved_tells_no_share():
    model, tracker, opt = attached(mlp(64), apply="step")
    tracker(model(torch.randn(8, 64)).square().mean()).backward()
    with opt.observe():
        opt.step()
    rows = [row for row in opt.report().rows if row.kind == "matrix"]
    assert all(row.is_projected and row.energy is None for row in rows)
    assert all(row.update_norm > 0 for row in rows)


def test_which_parameters_are_observed_and_until_when():
    model, tracker, opt = attached()
    with pytest.raises(ArgumentError, match=r"observe\('encoder\.\*'\) matches no attached parameter.*'0\.weight'"):
        opt.observe("0.*", "encoder.*")
    assert not any(record.observer for record in opt.records)
    outer = opt.observe("0.*")
    with opt.observe("*.bias"):
        train(model, opt, tracker, 1)
    train(model, opt, tracker, 1)
    outer.stop()
    outer.stop()
    train(model, opt, tracker, 1)
    seen = {row.name: row.observed_step for row in opt.report().rows if row.observed_step is not None}
    assert seen == {"0.weight": 2, "0.bias": 2, "2.bias": 1, "4.bias": 1}
    assert {row.steps for row in opt.report().rows} == {3}
    opt.load_state_dict(opt.state_dict())
    assert not opt.report().is_observed
    first, second = opt.observe("0.*"), opt.observe("0.weight")
    first.stop()
    train(model, opt, tracker, 1)
    assert [row.name for row in opt.report().rows if row.observed_step is not None] == ["0.weight"]
    second.stop()
    assert not any(record.observer for record in opt.records)


class Overflowing(TrackedMomentum):
    """A rule whose update is not finite."""

    def update(self, gradient, state, settings):
        update, state = super().update(gradient, state, settings)
        return Update(left=update.left * torch.inf, right=update.right), state


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_what_was_not_written_is_not_reported(apply):
    model, tracker, opt = attached(apply=apply, rule=Overflowing())
    opt.observe("*.weight")
    if apply == "backward":
        with pytest.raises(NonFiniteError):
            train(model, opt, tracker, 1)
    else:
        with pytest.warns(gradlr.GradlrWarning):
            train(model, opt, tracker, 1)
    assert not opt.report().is_observed


def test_a_zero_gradient_has_no_share_and_no_infinite_scalar():
    model, tracker, opt = attached()
    with opt.observe():
        tracker(0 * model(torch.randn(8, 16)).sum()).backward()
    report = opt.report()
    matrices = [row for row in report.rows if row.kind == "matrix"]
    assert all(row.energy is None and row.stable_rank == 0 and row.gradient_norm == 0 for row in matrices)
    assert report.energy is None and not any("energy" in name for name in report.scalars())
    assert all(math.isfinite(value) for value in report.scalars().values())


def test_stable_rank_of_the_momentum():
    model, tracker, opt = everything(momentum_rank=3)
    assert all(row.momentum_stable_rank is None for row in opt.report().rows)
    for seed in range(3):
        step(model, tracker, opt, seed, 1)
    rows = {row.name: row for row in opt.report().rows}
    for record in opt.records:
        state, row = opt.state[record.plan.parameter], rows[record.plan.name]
        if record.plan.kind == "matrix":
            assert row.momentum_stable_rank == pytest.approx(stable_rank(state["P"] @ state["R"].mT), rel=1e-9)
            assert 1 <= row.momentum_stable_rank <= 3
        else:
            assert row.momentum_stable_rank is None


def test_a_momentum_that_is_not_finite_has_no_stable_rank():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    for state in opt.state.values():
        for value in state.values():
            if value.is_floating_point():
                value.fill_(torch.nan)
    report = opt.report()
    assert all(row.momentum_stable_rank is None for row in report.rows)
    assert not any("momentum_stable_rank" in name for name in report.scalars())


def test_bytes_are_those_of_the_tensors_and_of_torchs_adamw():
    model, tracker, opt = attached(Mixed(), groups=[{"match": "conv.weight", "rank": 2}])
    report = opt.report()
    states = [{key: value for key, value in opt.state[s.plan.parameter].items() if key != "step"} for s in opt.records]
    assert [row.state_bytes for row in report.rows] == [sum(v.numel() * v.element_size() for v in s.values()) for s in states]
    assert report.state_bytes == opt.state_bytes()
    adamw = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    assert report.adamw_bytes == sum(s[key].nbytes for s in adamw.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert report.rank_mean == (2 + 4) / 2
    assert repr(opt).splitlines()[-1].strip() in str(report)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (3, 12, 9), (1, 12), (12, 1), (64, 64)])
@pytest.mark.parametrize("kind", ["dense", "deficient", "zero"])
def test_spectral_norm_is_exact_up_to_64_rows_or_columns(shape, kind):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    if kind == "deficient":
        matrix = matrix[..., :1] @ matrix[..., :1, :]
    matrix = 0 * matrix if kind == "zero" else matrix
    expected = torch.linalg.matrix_norm(matrix, ord=2)
    torch.testing.assert_close(spectral_norm(matrix), expected, rtol=1e-10, atol=1e-14)
    # float32 at the end of its range: squares would overflow.
    huge = (matrix * 1e30).float()
    torch.testing.assert_close(spectral_norm(huge), torch.linalg.matrix_norm(huge.double(), ord=2), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("decay", "rtol"), [(1.0, 4e-3), (0.97, 1e-6)])  # as documented; decaying spectra measured at 2e-9
def test_spectral_norm_of_large_matrices(decay, rtol):
    torch.manual_seed(0)
    matrix = torch.randn(500, 300, dtype=torch.float64)
    if decay < 1:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        matrix = (u * decay ** torch.arange(300)) @ vh
    ratio = (spectral_norm(matrix) / torch.linalg.matrix_norm(matrix, ord=2)).item()
    assert 1 - rtol < ratio <= 1 + 1e-12


def test_spectral_norm_of_what_is_not_finite():
    matrix = torch.ones(2, 4, 5)
    matrix[0, 1, 2] = torch.inf
    norms = spectral_norm(matrix)
    assert norms[0].isnan() and norms[1].item() == pytest.approx(20**0.5)


def test_norm_of_factors_with_more_columns_than_rows():
    torch.manual_seed(0)
    left, right = torch.randn(7, 40, dtype=torch.float64), torch.randn(9, 40, dtype=torch.float64)
    scale, dense = torch.rand(7, 1, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64)
    update = Update(left=left, right=right, row_scale=scale, dense=dense)
    expected = (scale * (left @ right.mT) + dense).square().sum()
    torch.testing.assert_close(direction_energy(update), expected, rtol=1e-12, atol=0)
    assert direction_energy(Update()) == 0


def observed(model=None):
    model, tracker, opt = attached(model, rank=gradlr.ByLoss(8), weight_decay=0.01)
    with opt.observe():
        train(model, opt, tracker, 2)
    return opt.report()


def test_text_is_one_aligned_table_with_totals():
    report = observed()
    lines = str(report).splitlines()
    assert lines[0].split()[:5] == ["parameter", "shape", "rank/most", "k", "energy"]
    row = next(line for line in lines if line.startswith("2.weight"))
    first = next(row for row in report.rows if row.name == "2.weight")
    place = lines[0].index("energy")
    assert row[place:].startswith(f"{first.energy:.1%}")
    assert f"{first.rank}/8" in row and "16 x 16" in row
    vectors = next(line for line in lines if line.startswith("3 vectors"))
    assert "384 B" in vectors and "48" in vectors  # two moments of 3 x 16 numbers
    assert "of AdamW's 6.4 KiB" in lines[5] and "captured energy" in lines[5]


def odd_model():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("a<b>[red]", nn.Linear(16, 16))
    model.in_features = 16
    return model


def odd_report():
    model, tracker, opt = attached(odd_model())
    with opt.observe():
        tracker(model(torch.randn(8, 16)).square().mean()).backward()
    return opt.report()


def test_rich_prints_the_same_rows():
    stream = io.StringIO()
    report = odd_report()
    rich.console.Console(file=stream, width=120).print(report)
    text = stream.getvalue()
    assert "a<b>[red].weight" in text and f"{report.rows[0].energy:.1%}" in text and "of AdamW's" in text


def test_html_escapes_names_and_draws_bars():
    report = odd_report()
    html = report._repr_html_()
    assert "a&lt;b&gt;[red].weight" in html and "<b>" not in html
    assert f"{100 * report.rows[0].energy:.1f}%" in html and "linear-gradient" in html
    assert html.count("<tr>") == 1 + 2


def test_figure_shows_ranks_shares_and_updates():
    report = observed()
    figure = report.plot()
    ranks, energy, updates = figure.axes
    rows = [row for row in report.rows if row.rank is not None]
    assert [label.get_text() for label in ranks.get_yticklabels()] == [row.name for row in rows]
    widths = [bar.get_width() for bar in ranks.patches]
    assert widths == [row.largest_rank for row in rows] + [row.rank for row in rows]
    shares = [bar.get_width() for bar in energy.patches][len(rows) :]
    assert shares == pytest.approx([100 * row.energy for row in rows])
    assert [bar.get_width() for bar in updates.patches] == pytest.approx([100 * row.relative_update for row in rows])
    again = matplotlib.figure.Figure()
    assert report.plot(again.subplots(1, 3)) is again
    with pytest.raises(ArgumentError, match="2 axes for 3 panels"):
        report.plot(again.subplots(1, 2))
    matplotlib.pyplot.close(figure)


def test_figure_of_what_was_not_observed():
    opt = attached()[2]
    axes = matplotlib.figure.Figure().subplots()
    assert len(opt.report().plot(axes).axes) == 1
    opt.detach()
    opt = attached(rule="adam")[2]
    with pytest.raises(ArgumentError, match="no parameter has a rank"):
        opt.report().plot(axes)


def test_without_matplotlib_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'gradlr\[notebook\]'"):
        attached()[2].report().plot()


def test_scalars_are_flat_finite_floats():
    report = observed()
    scalars = report.scalars()
    assert all(type(value) is float and math.isfinite(value) for value in scalars.values())
    assert scalars["gradlr/rank/0.weight"] == report.rows[0].rank
    assert scalars["gradlr/energy/0.weight"] == report.rows[0].energy
    assert scalars["gradlr/state_bytes"] == report.state_bytes
    assert scalars["gradlr/state_share"] == report.state_bytes / report.adamw_bytes
    assert {"gradlr/rank_mean", "gradlr/energy", "gradlr/gradient_norm", "gradlr/update_norm"} <= scalars.keys()
    assert "gradlr/rank/0.bias" not in scalars and "gradlr/update_norm/0.bias" in scalars
    assert {name.removeprefix("x.") for name in report.scalars(prefix="x.")} == {n.removeprefix("gradlr/") for n in scalars}


def test_neither_rich_nor_matplotlib_is_imported_unless_used():
    code = (
        "import sys, torch, gradlr\n"
        "opt = gradlr.attach(torch.nn.Linear(4, 4), gradlr.LossTracker())\n"
        "opt.report()._repr_html_(), str(opt.report()), opt.report().scalars()\n"
        "assert not {'rich', 'matplotlib'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_repr_shows_decay_and_limits_where_they_are_set():
    assert "decay" not in repr(attached()[2]) and "max" not in repr(attached()[2]).splitlines()[0]
    opt = attached(weight_decay=0.01, apply="step", max_grad_norm=1.0, max_norm_growth=1.01)[2]
    lines = repr(opt).splitlines()
    assert lines[0] == 'GradLR(apply="step", max_grad_norm=1, max_norm_growth=1.01)'
    place = lines[1].index("decay")
    cells = {line.split()[0]: line[place:].split()[0] for line in lines[2:-1]}
    assert cells["0.weight"] == "0.01" and cells["0.bias"] == "128"  # vectors have none: the next column, bytes
