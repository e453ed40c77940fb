"""What would silently go wrong is loud: each trap is an error or a warning that names the way out."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from models import attached, mlp, regression, train
from torch import nn

import gradlr
from gradlr import AttachError, BackwardError, GradlrWarning, LossError, NonFiniteError
from gradlr.gradient import Dense


def loss_of(model):
    x, y = regression(16, count=16)
    return nn.functional.mse_loss(model(x), y)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def is_unchanged(model, before):
    return all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_tracker_that_was_never_shown_a_loss(apply):
    model, _, _ = attached(apply=apply)
    before = weights(model)
    with pytest.raises(LossError, match=r"tracker\(loss\)\.backward\(\)"):
        loss_of(model).backward()
    assert is_unchanged(model, before)


def test_a_second_gradient_before_the_next_loss():
    model, tracker, _ = attached()
    tracker(loss_of(model)).backward()
    before = weights(model)
    with pytest.raises(BackwardError, match='second gradient.*apply="step"'):
        loss_of(model).backward()
    assert is_unchanged(model, before)
    tracker(loss_of(model)).backward()  # and the next shown loss goes on


@pytest.mark.parametrize("scale", [65536.0, 0.25])
def test_a_scaled_loss_is_refused_in_backward_mode_before_anything_changes(scale):
    model, tracker, _ = attached()
    before = weights(model)
    with pytest.raises(BackwardError, match='multiplied by.*apply="step".*Nothing was changed'):
        (tracker(loss_of(model)) * scale).backward()
    assert is_unchanged(model, before)


def test_a_scaled_loss_is_welcome_in_step_mode():
    model, tracker, opt = attached(apply="step")
    (tracker(loss_of(model)) * 0.25).backward()
    opt.step()


def test_losses_that_are_not_shown_any_more_are_told_once_where_gradients_wait():
    model, tracker, opt = attached(apply="step")
    tracker(loss_of(model)).backward()
    opt.step()
    loss_of(model).backward()
    with pytest.warns(GradlrWarning, match=r"was not shown; the last one it saw was number 1.*tracker\(loss\)"):
        opt.step()
    loss_of(model).backward()
    opt.step()


def test_step_after_a_backward_that_reached_nothing():
    model, tracker, opt = attached()
    copied = copy.deepcopy(model)
    tracker(loss_of(copied)).backward()
    with pytest.raises(AttachError, match="none of the 6 attached parameters.*copy"):
        opt.step()


def test_step_after_a_loss_without_a_graph_and_no_gradient():
    model, tracker, opt = attached()
    tracker(1.5)
    with pytest.warns(GradlrWarning, match="nothing to do.*none of the 6"):
        opt.step()


def test_the_next_loss_after_a_backward_that_reached_nothing_warns():
    model, tracker, _ = attached()
    tracker(loss_of(copy.deepcopy(model))).backward()
    with pytest.warns(GradlrWarning, match="none of the 6"):
        tracker(loss_of(model))


def test_evaluating_between_steps_is_no_trap():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    with torch.no_grad():
        loss_of(model)
    loss_of(copy.deepcopy(model)).backward()  # another model's business
    train(model, opt, tracker, 1)
    opt.step()
    opt.step()


@pytest.mark.parametrize("replace", ["assign", "new"])
def test_parameters_replaced_since_attaching(replace):
    model, tracker, _ = attached()
    if replace == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model[0].weight = nn.Parameter(torch.randn(16, 16))
    count = 6 if replace == "assign" else 1
    with pytest.raises(AttachError, match=f"{count} of 6 parameters were replaced since attach.*'0.weight' first"):
        tracker(loss_of(model))


@pytest.mark.parametrize("capture", ["hook", "adaptor"])
@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_whole_step_out(apply, bad, capture):
    model, tracker, opt = attached(apply=apply, capture=capture)
    train(model, opt, tracker, 2)
    before, state = weights(model), copy.deepcopy(opt.state_dict())

    def one_step():
        tracker(loss_of(model) * bad).backward()
        opt.step()

    with pytest.warns(GradlrWarning, match=r"left out whole: loss number 3 is (nan|inf)"):
        one_step()
    assert is_unchanged(model, before)
    assert opt.skipped == 1
    torch.testing.assert_close(state["state"], opt.state_dict()["state"], rtol=0, atol=0)
    train(model, opt, tracker, 1)
    assert not is_unchanged(model, before)
    assert opt.skipped == 1


@pytest.mark.parametrize("capture", ["hook", "adaptor"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error_where_backward_updates(bad, capture):
    model, tracker, opt = attached(capture=capture)
    before = weights(model)
    loss = loss_of(model)
    loss.register_hook(lambda gradient: gradient * bad)  # behind the tracker's own look at the loss
    with pytest.raises(NonFiniteError, match=r"'4\.(weight|bias)' holds NaN or infinity.*Nothing was changed"):
        tracker(loss.clone()).backward()
    assert is_unchanged(model, before)
    train(model, opt, tracker, 1)
    assert not is_unchanged(model, before)


def test_a_gradient_that_explodes_on_its_way_names_what_was_changed():
    model, tracker, opt = attached()
    before = weights(model)
    model[2].weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"'2\.weight'.*(parameters were|parameter was) updated before it"):
        tracker(loss_of(model)).backward()
    assert set(opt.interrupted) == {"4.weight", "4.bias", "2.bias"}
    assert not torch.equal(before[4], model[4].weight)
    assert torch.equal(before[2], model[2].weight)


def test_huge_finite_gradients_are_no_error():
    model, tracker, opt = attached(nn.Linear(16, 16, bias=False))
    before = weights(model)
    (tracker(model(torch.randn(8, 16)).square().mean() * 1e34)).backward()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not is_unchanged(model, before)


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_gradient_too_large_to_be_squared_does_not_silence_adam_for_ever(apply):
    """Adam's second moment would be infinite from here on, and every later update zero."""
    model, tracker, opt = attached(apply=apply)
    before = weights(model)

    def one_step():
        tracker(loss_of(model) * 1e34).backward()
        opt.step()

    is_told = pytest.raises if apply == "backward" else pytest.warns
    with is_told(NonFiniteError if apply == "backward" else GradlrWarning, match=r"'\d\.bias'.*too large for its update"):
        one_step()
    assert all(value.isfinite().all() for state in opt.state.values() for value in state.values())
    assert torch.equal(before[5], model[4].bias)
    assert apply == "backward" or is_unchanged(model, before)  # a step is taken whole or not at all
    train(model, opt, tracker, 1)


class SparseEntries(torch.autograd.Function):
    """The identity, whose gradient is sparse by entries."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to_sparse(2)


def test_gradients_that_are_sparse_by_entries_are_refused():
    model = nn.Linear(8, 4, bias=False)
    _, tracker, _ = attached(model)
    before = weights(model)
    with pytest.raises(BackwardError, match="sparse_coo.*by rows"):
        tracker(SparseEntries.apply(model.weight).sum()).backward()
    assert is_unchanged(model, before)


def test_a_lost_optimizer_is_told_in_the_next_backward():
    model, tracker, opt = attached()
    del opt
    gc.collect()
    with pytest.raises(AttachError, match="Keep it in a variable"):
        tracker(loss_of(model)).backward()
    model.zero_grad()
    gradlr.attach(model, tracker).detach()  # attaching anew is allowed


@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
@pytest.mark.parametrize("capture", ["hook", "adaptor"])
@pytest.mark.parametrize("has_scheduler", [False, True])
def test_a_dropped_optimizer_frees_its_state_and_does_not_block_a_new_one(has_scheduler, capture):
    model, tracker, opt = attached(capture=capture)
    if has_scheduler:  # makes the optimizer part of a reference cycle, in some versions of torch
        opt.itself = opt
        scheduler = torch.optim.lr_scheduler.ConstantLR(opt)
        train(model, opt, tracker, 1)
        scheduler.step()
        del scheduler
    else:
        train(model, opt, tracker, 1)
    state = weakref.ref(opt.state[model[0].weight]["P"])
    del opt
    _, tracker, opt = attached(model, capture=capture)
    assert state() is None
    train(model, opt, tracker, 1)


def test_a_dropped_model_frees_everything():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    references = [weakref.ref(thing) for thing in (model, model[0].weight, opt, opt.state[model[0].weight]["P"])]
    del model, opt
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_detach_gives_back_ordinary_parameters():
    model, tracker, opt = attached()
    opt.detach()
    opt.detach()
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert opt.state[model[0].weight]["P"].shape == (16, 2)


def test_an_error_in_a_rule_leaves_the_weight_and_its_state():
    class Broken(gradlr.rules.TrackedMomentum):
        def update(self, gradient, state, settings):
            super().update(gradient, state, settings)
            raise RuntimeError("the rule is broken")

    model, tracker, opt = attached(nn.Linear(8, 8, bias=False), rule=Broken())
    before, state = weights(model), copy.deepcopy(opt.state[model.weight])
    with pytest.raises(RuntimeError, match="broken"):
        tracker(model(torch.randn(4, 8)).square().mean()).backward()
    assert is_unchanged(model, before)
    torch.testing.assert_close(dict(opt.state[model.weight]), state, rtol=0, atol=0)


def test_groups_are_fixed_once_attached():
    _, _, opt = attached()
    with pytest.raises(gradlr.ArgumentError, match="fixed once attached"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_the_update_never_goes_round_the_version_counter():
    """Two forwards before two backwards: autograd itself must notice that the weight has changed."""
    model, tracker, _ = attached(mlp(16, 3))
    first, second = loss_of(model), loss_of(model)
    tracker(first).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tracker(second).backward()


def test_create_graph_does_not_spoil_the_graph():
    model, tracker, opt = attached(nn.Linear(6, 6, bias=False))
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.warns(UserWarning, match="create_graph"):
        tracker(model(x).pow(3).sum()).backward(create_graph=True)
    assert model.weight.grad is None
    assert x.grad is not None


def test_a_dense_gradient_is_consumed_only_where_it_is_owned():
    gradient = torch.randn(6, 6)
    kept = gradient.clone()
    model, tracker, opt = attached(nn.Linear(6, 6, bias=False), rank=2)
    tracker(1.0)
    opt.receive(model.weight, Dense(gradient))
    assert torch.equal(gradient, kept)


def test_an_unfrozen_or_new_parameter_is_told_once():
    model = mlp()
    model[0].weight.requires_grad_(False)
    _, tracker, opt = attached(model)
    train(model, opt, tracker, 1)
    model[0].weight.requires_grad_(True)
    with pytest.warns(GradlrWarning, match=r"1 trainable parameters of the model are not attached \('0\.weight' first\)"):
        tracker(loss_of(model))
    tracker(loss_of(model))


def test_a_backward_that_does_not_pass_through_the_shown_loss():
    """The second half of a GAN's step: the generator's loss reaches the discriminator, whose tracker was shown another one."""
    model, tracker, _ = attached()
    before = weights(model)
    tracker(loss_of(model))
    with pytest.raises(BackwardError, match="does not pass through loss number 1.*a tracker each.*Nothing was changed"):
        loss_of(model).backward()
    assert is_unchanged(model, before)


def test_where_gradients_wait_backwards_add_up_as_in_torch():
    """One of two losses is shown, and not the first to be called: exact at full rank."""
    x, y = regression(8, count=16, dtype=torch.float64)
    results = []
    for is_split in (False, True):
        model, tracker, opt = attached(mlp(8, 2, dtype=torch.float64), apply="step", rank=8, momentum_rank=8)
        first, second = (nn.functional.mse_loss(model(x[rows]), y[rows]) for rows in (slice(8), slice(8, 16)))
        tracker(first)
        if is_split:
            second.backward()
            first.backward()
        else:
            (first + second).backward()
        opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_tracker_that_is_rolled_back_is_no_second_gradient():
    model, tracker, opt = attached()
    tracker(loss_of(model)).backward()
    state = tracker.state_dict()
    tracker(loss_of(model)).backward()
    tracker.load_state_dict(state)
    tracker(loss_of(model)).backward()


def test_a_submodule_taken_out_of_the_model_is_not_replaced():
    model, tracker, opt = attached()
    last = model[4]
    del model[4]
    tracker(last(model(torch.randn(4, 16))).square().mean()).backward()


def test_a_loss_of_shape_one_has_a_scalar_scale():
    model, tracker, opt = attached()
    tracker(loss_of(model).reshape(1)).backward()
    assert tracker.scale.shape == ()


def test_two_optimizers_may_share_a_tracker_and_a_loss():
    encoder, decoder = mlp(), mlp(seed=1)
    tracker = gradlr.LossTracker()
    with gradlr.attach(encoder, tracker) as one, gradlr.attach(decoder, tracker) as other:
        for _ in range(2):
            tracker(loss_of(nn.Sequential(encoder, decoder))).backward()
            one.step()
            other.step()
        tracker(loss_of(encoder)).backward()  # the decoder's rest is no trap
        one.step()
        other.step()


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_bad_loss_leaves_out_the_step_of_those_only_that_its_backward_reaches(apply):
    encoder, decoder, tracker = mlp(), mlp(seed=1), gradlr.LossTracker()
    one, other = (gradlr.attach(model, tracker, apply=apply) for model in (encoder, decoder))
    before, kept = weights(encoder), weights(decoder)

    def one_turn():
        tracker(loss_of(decoder)).backward()
        tracker(loss_of(encoder) * float("nan")).backward()
        one.step()

    with pytest.warns(GradlrWarning, match="left out whole: loss number 2 is nan") as told:
        one_turn()
    other.step()
    assert len(told) == 1 and (one.skipped, other.skipped) == (1, 0)
    assert is_unchanged(encoder, before) and not any(torch.equal(a, b) for a, b in zip(kept, weights(decoder), strict=True))


def test_accumulating_where_backward_updates_is_told_at_step():
    model, tracker, opt = attached()
    for _ in range(3):
        tracker(loss_of(model)).backward()
    with pytest.warns(GradlrWarning, match='3 backward passes have each updated.*apply="step"'):
        opt.step()
    for _ in range(2):
        tracker(loss_of(model)).backward()
    opt.step()  # told once


class FailingLayer(nn.Module):
    """Identity whose backward fails while `is_failing`."""

    def __init__(self):
        super().__init__()
        self.is_failing = False

    def forward(self, x):
        if self.is_failing:
            x.register_hook(self.fail)
        return x * 1

    def fail(self, gradient):
        raise MemoryError("out of memory")


def failing_model():
    layers = list(mlp())
    return nn.Sequential(*layers[:2], FailingLayer(), *layers[2:])


def test_an_interrupted_backward_is_told_at_the_next_loss_with_what_it_changed():
    model, tracker, opt = attached(failing_model())
    model[2].is_failing = True
    with pytest.raises(MemoryError):
        tracker(loss_of(model)).backward()
    model[2].is_failing = False
    opt.zero_grad()  # the head of an ordinary loop
    with pytest.warns(GradlrWarning, match="loss number 1 did not come to its end.*4 parameters were updated"):
        tracker(loss_of(model)).backward()
    opt.step()
    tracker(loss_of(model)).backward()


def test_each_optimizer_of_a_shared_tracker_drops_its_own_half():
    encoder, decoder, tracker = failing_model(), mlp(seed=1), gradlr.LossTracker()
    one = gradlr.attach(encoder, tracker, apply="step")
    other = gradlr.attach(decoder, tracker, apply="step")
    both, before = nn.Sequential(encoder, decoder), weights(decoder)
    encoder[2].is_failing = True
    with pytest.raises(MemoryError):
        tracker(loss_of(both)).backward()
    one.zero_grad()
    with pytest.raises(BackwardError, match="did not come to its end"):
        other.step()
    assert is_unchanged(decoder, before)


def test_the_sketches_of_an_interrupted_backward_never_join_a_step():
    model, tracker, opt = attached(failing_model(), apply="step")
    shadow, shadow_tracker, shadow_opt = attached(failing_model(), apply="step")
    before = weights(model)
    model[2].is_failing = True
    for call in ("loss", "step", "zero_grad"):
        with pytest.raises(MemoryError):
            tracker(loss_of(model)).backward()
        if call == "loss":
            with pytest.warns(GradlrWarning, match="did not come to its end.*4 parameters\\) are dropped"):
                tracker(loss_of(model))
        elif call == "step":
            with pytest.raises(BackwardError, match="did not come to its end"):
                opt.step()
        else:
            opt.zero_grad()
    assert is_unchanged(model, before)
    model[2].is_failing = False
    train(model, opt, tracker, 1, x=regression(16)[0], y=regression(16)[1])
    train(shadow, shadow_opt, shadow_tracker, 1, x=regression(16)[0], y=regression(16)[1])
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), shadow.parameters(), strict=True))


@pytest.mark.parametrize("is_shown", [True, False])
@pytest.mark.parametrize("is_last", [True, False])
def test_a_backward_that_ends_well_does_not_hide_one_that_failed(is_shown, is_last):
    """Two losses are there before the first backward: half of one of them must not join the other."""
    model, tracker, opt = attached(failing_model(), apply="step")
    before = weights(model)
    model[2].is_failing = True
    failing = loss_of(model)
    model[2].is_failing = False
    failing = tracker(failing) if is_shown else failing
    sound = tracker(loss_of(model))
    for loss in (sound, failing) if is_last else (failing, sound):
        with pytest.raises(MemoryError) if loss is failing else contextlib.nullcontext():
            loss.backward()
    name = "loss number 1" if is_shown else "a loss that was not shown"
    with pytest.raises(BackwardError, match=f"the backward of {name} did not come to its end.*6 parameters"):
        opt.step()
    assert is_unchanged(model, before) and opt.interrupted == ()
    train(model, opt, tracker, 1)
    assert not is_unchanged(model, before)


def test_a_step_after_detach():
    model, tracker, opt = attached()
    opt.detach()
    with pytest.raises(AttachError, match="after opt.detach"):
        opt.step()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("apply", ["backward", "step"])
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_a_graph_from_before_detach_gives_ordinary_gradients(apply, again):
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    plain, ids = copy.deepcopy(model), torch.randint(0, 9, (4, 3))
    plain(ids).square().mean().backward()
    _, tracker, opt = attached(model, capture="adaptor", apply=apply, rule=gradlr.rules.TrackedMomentum(residual=0))
    before, loss = weights(model), tracker(model(ids).square().mean())
    opt.detach()
    if again:
        _, other_tracker, other = attached(model, apply="step")
        other_tracker(1.0)
    loss.backward()
    assert is_unchanged(model, before) and opt.pending.gradients.get(1) is None
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if again:
            (mine,) = (other.pending.gradients[record.index].matrix for record in other.records if record.plan.parameter is mine)
        torch.testing.assert_close(mine if again else mine.grad, theirs.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_a_one_sided_graph_from_before_detach_has_no_gradient_to_give():
    model, tracker, opt = attached(capture="one_sided")
    loss = tracker(loss_of(model))
    opt.detach()
    with pytest.raises(BackwardError, match=r"opt.detach\(\) since the forward.*capture=\"adaptor\""):
        loss.backward()


def test_detaching_while_gradients_wait_is_told_but_not_after_an_error():
    model, tracker, opt = attached(apply="step")
    tracker(loss_of(model)).backward()
    with pytest.warns(GradlrWarning, match="drops the gradients of 6 parameters"):
        opt.detach()
    _, tracker, opt = attached(model, apply="step")
    tracker(loss_of(model)).backward()
    opt.__exit__(KeyError, KeyError(), None)


def test_no_loss_was_shown_since_a_checkpoint_was_loaded():
    model, tracker, opt = attached()
    train(model, opt, tracker, 1)
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(LossError, match="since a checkpoint was loaded"):
        loss_of(model).backward()


@pytest.mark.parametrize("change", [lambda model: model.double(), lambda model: model.bfloat16()])
def test_another_dtype_since_attaching(change):
    model, tracker, _ = attached()
    change(model)
    with pytest.raises(AttachError, match=r"'0\.weight' was \(16, 16\) torch.float32 on cpu when it was attached and is"):
        tracker(1.0)


def test_a_container_made_for_the_call_does_not_blind_the_check():
    encoder, decoder = mlp(), mlp(seed=1)
    _, tracker, opt = attached(nn.ModuleList([encoder, decoder]))
    gc.collect()
    tracker(1.0)
    decoder.load_state_dict(copy.deepcopy(decoder.state_dict()), assign=True)
    with pytest.raises(AttachError, match=r"6 of 12 parameters were replaced since attach \('1\.0\.weight' first\)"):
        tracker(1.0)


@pytest.mark.parametrize(
    "parts",
    [
        lambda g: {"dense": g.mean()},
        lambda g: {"dense": g[:1]},
        lambda g: {"left": g, "right": g[:3]},
        lambda g: {"left": g},
    ],
)
def test_an_update_of_another_shape_is_refused(parts):
    class Wrong(gradlr.rules.Rule):
        name, is_elementwise = "wrong", True

        def init(self, shape, settings, *, dtype, device):
            return {}

        def update(self, gradient, state, settings):
            return gradlr.rules.Update(**parts(gradient.matrix)), {}

    model, tracker, _ = attached(nn.Linear(8, 6, bias=False), rule=Wrong())
    before = weights(model)
    with pytest.raises(gradlr.ShapeError, match="rule 'wrong' made an update"):
        tracker(model(torch.randn(4, 8)).sum()).backward()
    assert is_unchanged(model, before)


def test_an_update_of_another_type_is_refused():
    class Bare(gradlr.rules.TrackedMomentum):
        def update(self, gradient, state, settings):
            return gradient.matrix

    model, tracker, _ = attached(nn.Linear(8, 6, bias=False), rule=Bare())
    with pytest.raises(gradlr.ArgumentError, match=r"update\(\) must return .*not Tensor"):
        tracker(model(torch.randn(4, 8)).sum()).backward()


def test_a_step_that_never_comes_is_told():
    model, tracker, opt = attached(nn.Linear(4, 4), apply="step")
    for _ in range(256):
        tracker(model(torch.randn(2, 4)).square().mean()).backward()
    with pytest.warns(GradlrWarning, match="256 losses wait.*call opt.step"):
        tracker(1.0)


def test_an_update_that_is_not_finite_is_refused():
    class Dividing(gradlr.rules.Rule):
        name, is_elementwise = "dividing", True

        def init(self, shape, settings, *, dtype, device):
            return {}

        def update(self, gradient, state, settings):
            return gradlr.rules.Update(dense=gradient.matrix / gradient.matrix.norm()), {}

    model, tracker, _ = attached(nn.Linear(8, 6, bias=False), rule=Dividing())
    before = weights(model)
    with pytest.raises(NonFiniteError, match="'weight'"):
        tracker((model(torch.randn(4, 8)) * 0).sum()).backward()
    assert is_unchanged(model, before)


def test_entries_whose_products_overflow_are_an_error_of_ours():
    model, tracker, opt = attached(nn.Linear(16, 16, bias=False))
    tracker(1.0)
    with pytest.raises(NonFiniteError, match="'weight'"):
        opt.receive(model.weight, Dense(torch.full((16, 16), 3e38)))


def test_a_gradient_that_another_hook_has_kept_is_not_overwritten():
    model, kept = nn.Linear(16, 16, bias=False), []
    model.weight.register_post_accumulate_grad_hook(lambda p: kept.append((p.grad, p.grad.clone())))
    _, tracker, opt = attached(model)
    tracker(model(torch.randn(4, 16)).square().mean()).backward()
    ((gradient, copied),) = kept
    assert torch.equal(gradient, copied)


def test_an_optimizer_is_not_copied_but_a_tracker_is():
    model, tracker, opt = attached()
    train(model, opt, tracker, 2)
    with pytest.raises(AttachError, match="state_dict"):
        copy.deepcopy(opt)
    assert copy.deepcopy(tracker).history == tracker.history


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(4), "no values yet"),
        (nn.Linear(4, 4, device="meta"), "no values yet"),
        (nn.ParameterList([nn.Parameter(torch.randn(1, 4).expand(3, 4))]), "expanded view"),
    ],
)
def test_parameters_that_cannot_be_written_are_refused(model, message):
    with pytest.raises(AttachError, match=message):
        gradlr.attach(model, gradlr.LossTracker())


def test_a_gradient_that_other_nodes_still_need_is_not_overwritten():
    """A sum hands the same buffer to both of its terms; the layer below must get its gradient whole."""
    torch.manual_seed(0)
    patch, position, head = nn.Linear(12, 16), nn.Embedding(9, 16), nn.Linear(16, 4)
    model = nn.ModuleList([patch, position, head])
    _, tracker, opt = attached(model, rank=2, momentum_rank=1)
    hidden = patch(torch.randn(1, 9, 12))
    loss = (head(torch.tanh(hidden + position.weight.unsqueeze(0))) ** 2).sum()
    (expected,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    found = []
    hidden.register_hook(lambda gradient: found.append(gradient.clone()))
    tracker(loss).backward()
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("rules", [("tracked_momentum", "adam"), ("adam", "tracked_momentum")])
def test_gradients_that_share_a_buffer_wait_apart(rules):
    results = []
    for is_shared in (False, True):
        torch.manual_seed(0)
        model = nn.ParameterDict({"a": torch.randn(8, 8, dtype=torch.float64), "b": torch.randn(8, 8, dtype=torch.float64)})
        groups = [{"match": name, "rule": rule} for name, rule in zip("ab", rules, strict=True)]
        _, tracker, opt = attached(model, apply="step", groups=groups, max_grad_norm=0.5)
        total = model["a"].view(-1) + model["b"].view(-1) if is_shared else (model["a"] * 1 + model["b"] * 1).view(-1)
        tracker(total.square().sum()).backward()
        opt.step()
        results.append(weights(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
