"""Adam and RowwiseRMSprop against their references, and a rule that a user writes."""

import pytest
import torch
from models import mlp, train
from reference.elementwise import AdamReference, RowwiseRMSpropReference
from rules.driving import context, descend, first_state, random_gradients
from torch import nn

import gradlr
from gradlr import ArgumentError, ShapeError
from gradlr.gradient import Dense
from gradlr.rules import Adam, RowwiseRMSprop, Rule, Update

COUNT = 20
# float64, 20 steps of a few roundings each on numbers of about one.
TIGHT = {"rtol": 0.0, "atol": 1e-13}
ADAM_OPTIONS = [{}, {"beta2": 0.95, "eps": 1e-3}]


def settings_of_adam(rule, beta, weight_decay):
    return {"betas": (beta, rule.beta2), "eps": rule.eps, "weight_decay": weight_decay, "foreach": False}


@pytest.mark.parametrize("shape", [(), (12,), (7, 5), (3, 4, 5)])
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_torchs_adamw(shape, options, beta, weight_decay):
    rule, gradients, weight = Adam(**options), random_gradients(shape, COUNT), torch.randn(shape, dtype=torch.float64)
    written = {"lr": 0.05, "beta": beta, "weight_decay": weight_decay}
    weights, _ = descend(rule, first_state(rule, shape), gradients, weight=weight, **written)
    parameter = nn.Parameter(weight.clone())
    torchs = torch.optim.AdamW([parameter], lr=0.05, **settings_of_adam(rule, beta, weight_decay))
    for gradient, found in zip(gradients, weights, strict=True):
        parameter.grad = gradient
        torchs.step()
        torch.testing.assert_close(found, parameter.detach(), **TIGHT)


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_adam_is_its_reference(options):
    rule, gradients, weight = Adam(**options), random_gradients((9,), COUNT), torch.randn(9, dtype=torch.float64)
    written = {"lr": 0.05, "beta": 0.8, "weight_decay": 0.1}
    weights, _ = descend(rule, first_state(rule, (9,)), gradients, weight=weight, **written)
    reference = AdamReference(weight.numpy(), beta2=rule.beta2, eps=rule.eps, **written)
    for gradient, found in zip(gradients, weights, strict=True):
        reference.step(gradient.numpy())
        torch.testing.assert_close(found, torch.from_numpy(reference.weight), **TIGHT)


def test_vectors_of_an_attached_model_are_torchs_adamw():
    model, tracker = nn.LayerNorm(6, dtype=torch.float64), gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, kinds={"vector": {"lr": 0.05}}, weight_decay=0.1, beta=0.9)
    twin = nn.LayerNorm(6, dtype=torch.float64)
    torchs = torch.optim.AdamW(twin.parameters(), lr=0.05, betas=(0.9, 0.999), weight_decay=0.0)
    for x in random_gradients((4, 6), COUNT):
        tracker((model(x) * x).sum()).backward()
        opt.step()
        torchs.zero_grad()
        (twin(x) * x).sum().backward()
        torchs.step()
        for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found.detach(), expected.detach(), **TIGHT)


@pytest.mark.parametrize("shape", [(11, 4), (4, 11), (1, 5), (5, 1)])
@pytest.mark.parametrize("options", [{}, {"beta2": 0.9, "eps": 1e-2}], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rowwise_rmsprop_is_its_reference(shape, options, weight_decay):
    rule, gradients, weight = RowwiseRMSprop(**options), random_gradients(shape, COUNT), torch.randn(shape, dtype=torch.float64)
    gradients = [gradient.index_fill(0, torch.tensor([0]), 0.0) if shape[0] > 1 else gradient for gradient in gradients]
    written = {"lr": 0.05, "weight_decay": weight_decay}
    weights, _ = descend(rule, first_state(rule, shape), gradients, weight=weight, **written)
    reference = RowwiseRMSpropReference(weight.numpy(), beta2=rule.beta2, eps=rule.eps, **written)
    for gradient, found in zip(gradients, weights, strict=True):
        reference.step(gradient.numpy())
        torch.testing.assert_close(found, torch.from_numpy(reference.weight), **TIGHT)


def test_rowwise_rmsprop_leaves_rows_without_gradient():
    rule, gradient = RowwiseRMSprop(), torch.randn(5, 3)
    gradient[[1, 4]] = 0
    update, _ = rule.update(Dense(gradient), first_state(rule, (5, 3), torch.float32), context())
    assert update.dense.any(dim=1).tolist() == [True, False, True, True, False]


def test_tables_of_an_attached_model_are_the_rowwise_reference():
    model, tracker = nn.Embedding(7, 3, dtype=torch.float64), gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, kinds={"embedding": {"lr": 0.05}}, weight_decay=0.1)
    reference = RowwiseRMSpropReference(model.weight.detach().numpy(), lr=0.05, weight_decay=0.1)
    for gradient in random_gradients((7, 3), COUNT):
        tracker(1.0)
        opt.receive(model.weight, Dense(gradient))
        reference.step(gradient.numpy())
        torch.testing.assert_close(model.weight.detach(), torch.from_numpy(reference.weight), **TIGHT)


@pytest.mark.parametrize(("rule", "shape"), [(Adam(), (3, 5, 4)), (RowwiseRMSprop(), (3, 5, 4))], ids=["adam", "rowwise"])
def test_a_batch_is_a_loop_over_it(rule, shape):
    gradients, weight = random_gradients(shape, 5), torch.randn(shape, dtype=torch.float64)
    found = descend(rule, first_state(rule, shape), gradients, weight=weight, lr=0.1)[0][-1]
    for index in range(3):
        single = [gradient[index] for gradient in gradients]
        alone = descend(rule, first_state(rule, shape[1:]), single, weight=weight[index], lr=0.1)[0][-1]
        torch.testing.assert_close(found[index], alone, **TIGHT)


def test_a_vector_is_no_table():
    with pytest.raises(ShapeError, match="table"):
        first_state(RowwiseRMSprop(), (5,))


@pytest.mark.parametrize("rule", [Adam, RowwiseRMSprop])
@pytest.mark.parametrize("options", [{"beta2": 1.0}, {"beta2": "0.9"}, {"eps": -1e-8}, {"eps": float("nan")}], ids=str)
def test_options_out_of_range_are_errors(rule, options):
    with pytest.raises(ArgumentError):
        rule(**options)


# -- a rule of one's own -----------------------------------------------------------------------------------------------


class SignMomentum(Rule):
    """The sign of a running mean of gradients, scaled like an orthogonal update: a user's own rule."""

    name = "sign_momentum"
    is_elementwise = True

    def init(self, shape, context, *, dtype, device):
        return {"mean": torch.zeros(shape, dtype=dtype, device=device)}

    def update(self, gradient, state, context):
        mean = torch.lerp(gradient.matrix, state["mean"], context.beta)
        return Update(dense=0.2 * mean.sign()), {"mean": mean}


class PowerStep(Rule):
    """One power step on the gradient alone, a matrix rule without any state, known through products only."""

    name = "power_step"

    def init(self, shape, context, *, dtype, device):
        return {}

    def update(self, gradient, state, context):
        right = torch.randn(gradient.shape[-1], context.rank, dtype=gradient.dtype, generator=context.generator)
        left = torch.linalg.qr(gradient @ right).Q
        across = gradient.mT @ left
        return Update(left=left, right=across / across.norm().clamp(min=1e-12)), {}


@pytest.mark.parametrize("rule", [SignMomentum(), PowerStep()], ids=["sign_momentum", "power_step"])
@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_users_own_rule_trains_a_small_regression(rule, apply):
    model, tracker = mlp(), gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, rule=rule, rank=4, lr=2e-2, apply=apply)
    losses = train(model, opt, tracker, 60)
    # Means over one pass of the four batches.
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_a_users_own_rule_is_named_in_the_optimizer_and_goes_on_from_a_checkpoint():
    def attached():
        model, tracker = mlp(), gradlr.LossTracker()
        return model, tracker, gradlr.attach(model, tracker, rule=SignMomentum(), rank=4, lr=1e-2)

    model, tracker, opt = attached()
    train(model, opt, tracker, 4)
    assert "sign_momentum" in repr(opt)
    twin, twin_tracker, twin_opt = attached()
    twin.load_state_dict(model.state_dict())
    twin_opt.load_state_dict(opt.state_dict())
    assert train(model, opt, tracker, 4, start=4) == train(twin, twin_opt, twin_tracker, 4, start=4)


def test_a_name_or_a_class_that_is_no_rule_is_an_error():
    for rule in ("sign", SignMomentum, None):
        with pytest.raises(ArgumentError, match="rule"):
            gradlr.attach(mlp(), gradlr.LossTracker(), rule=rule)
